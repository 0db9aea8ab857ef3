"""server/rollouts"""
