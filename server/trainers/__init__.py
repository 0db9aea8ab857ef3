"""server/trainers"""
