"""Prompts to which a model thinks while probes are sampled; `--prompts FILE` replaces them.

Written for this purpose: short questions of many kinds that take several steps to answer, so that
the queries of the thoughts are those of reasoning and not of one subject.
"""

PROMPTS = (
    "A bakery sells rolls in bags of 6 and buns in bags of 8. Omar buys 5 bags of rolls and 3 "
    "bags of buns, and gives away a third of everything. How many pieces are left? Think step by "
    "step.",
    "A train leaves at 9:40 and travels 150 km at 75 km/h, waits 12 minutes, and then travels 60 "
    "km at 90 km/h. When does it arrive? Show each step.",
    "Nadia has twice as many stamps as Leo. After she gives him 14, both have the same number. "
    "How many did each have at first? Check your answer.",
    "A tank is filled by one pipe in 6 hours and by another in 4 hours, and a leak empties it in "
    "12. How long does it take to fill with all three open? Explain your reasoning.",
    "Find all pairs of positive whole numbers whose sum is 30 and whose product is 221.",
    "The price of a coat rises by 20 percent and then falls by 25 percent to 54 euros. What was "
    "it at first? Work it out slowly and check the result.",
    "Is 1,001 a prime number? Test the possible divisors one after another.",
    "What is the remainder when 7 to the power of 100 is divided by 5? Find the pattern first.",
    "How many three-digit numbers have digits that add up to 5? List the cases in order.",
    "Three dice are thrown. What is the probability that the largest number is exactly 4? Derive "
    "it step by step.",
    "A rectangle has a perimeter of 46 cm and a diagonal of 17 cm. What is its area?",
    "Prove that the sum of two odd numbers is always even, and then that the product of two odd "
    "numbers is always odd.",
    "Solve the equation 3(x - 4) + 2 = 5x - 18 and explain what you do to both sides.",
    "Anna, Ben and Cleo own a cat, a dog and a parrot. Anna is allergic to fur. Ben walks his pet "
    "every morning. Who owns what? Go through the clues.",
    "On an island knights always tell the truth and knaves always lie. A says: 'B is a knave.' B "
    "says: 'A and I are of the same kind.' What are they? Consider every case.",
    "Five runners finish a race. Dan is before Eva but after Finn. Gus is last. Hana is right "
    "before Eva. In which order did they finish?",
    "All poets in the club are members of the choir. Some members of the choir are cooks. Does it "
    "follow that some poets are cooks? Give your reasons.",
    "You have 8 coins, one of which is lighter, and a balance. How do you find it in two "
    "weighings? Describe every outcome.",
    "A farmer must cross a river with a wolf, a goat and a cabbage, and the boat takes only one "
    "of them at a time. Plan the trips and say why each is safe.",
    "Which number comes next: 2, 5, 11, 23, 47? Try several rules before you decide.",
    "Write a Python function that returns the second largest number of a list without sorting it. "
    "Think about duplicates and short lists first, then test it by hand.",
    "This Python code should count vowels and always returns 0: `def f(s): n = 0; [n + 1 for c in "
    "s if c in 'aeiou']; return n`. Find out why and repair it.",
    "Trace this program line by line and say what it prints:\n\nx = [1, 2, 3]\ny = "
    "x\ny.append(4)\nx = x + [5]\nprint(len(x), len(y))",
    "Explain how binary search finds 37 in [3, 8, 15, 21, 37, 40, 52, 66], with the bounds at "
    "each step. What does it cost for a million numbers?",
    "Write a SQL query that lists each customer with the date of the latest order, also customers "
    "without orders. Explain each clause.",
    "A web page loads in 8 seconds for some users and in 1 second for others. In which order "
    "would you look for the cause? Give reasons.",
    "Write a function in JavaScript that checks whether brackets in a text are balanced. Discuss "
    "the cases `(]`, `((` and the empty text.",
    "Which is faster for 10,000 look-ups in 10,000 names, a list or a set? Estimate the number of "
    "comparisons of both.",
    "Plan a dinner for six with a budget of 60 euros; one guest is vegan and one eats no nuts. "
    "Compare two menus and choose one.",
    "I have three meetings of 45 minutes, a train at 16:20 and one hour of work that needs quiet. "
    "It is 10:00. Make a schedule for the day and say why it works.",
    "Plan a weekend trip by bicycle for a family with two children. Think about distance, "
    "weather, food and what may go wrong.",
    "My plant has yellow leaves and wet soil. What are possible causes, how do I tell them apart, "
    "and what do I do first?",
    "Should a small shop accept cards only? Weigh the arguments for and against, and then decide.",
    "Why is it colder on a mountain although it is nearer to the sun? Explain it as a chain of "
    "causes.",
    "An ice cube floats in a full glass of water. Does the glass overflow when the ice melts? "
    "Reason from first principles.",
    "Summarise in order what happens from the moment a letter is dropped into a post box until it "
    "is delivered, and where it may get lost.",
    "Un père a 41 ans et sa fille en a 13. Dans combien d'années aura-t-il le double de son âge ? "
    "Raisonne étape par étape.",
    "In einem Stall sind Hühner und Kaninchen, zusammen 35 Köpfe und 94 Beine. Wie viele sind es "
    "von jeder Art? Erkläre den Rechenweg.",
    "Una camisa cuesta 40 euros con un descuento del 20 por ciento. ¿Cuánto costaba antes? "
    "Explica cada paso y comprueba el resultado.",
    "小明有一些苹果，他把一半给了姐姐，又吃了 3 个，还剩 5 个。他原来有多少个苹果？请一步一步地思"
    "考。",
)
