"""Fifty prompts for a real chat model: questions, code, summaries, chats. The first five are of all kinds."""

_PASSAGE = (
    "The first bicycles had no pedals. In 1817 Karl von Drais built a wooden frame with two wheels that the rider pushed along with "
    "the feet. Pedals came in the 1860s, on the front wheel, so the wheel grew larger and larger to go faster. The chain, around 1885, "
    "let both wheels be small again, and air-filled tyres made the ride soft."
)
_MEETING = (
    "Anna: The library closes at six, so we cannot meet there. Ben: The café then? Anna: Too loud for a call. Ben: My office has a free "
    "room on Thursday after four. Anna: Good, I will bring the drawings, and you the list of prices."
)
_EXPLAIN = "def f(n):\n    a, b = 0, 1\n    while a < n:\n        yield a\n        a, b = b, a + b"

PROMPTS = [
    "What is the capital of France, and which river runs through it?",
    "Write a Python function that returns the largest of three numbers.",
    f"Summarize this text in one sentence:\n\n{_PASSAGE}",
    "Hi! I have had a long day and I am tired. How are you?",
    "What is 17 + 25? Explain step by step.",
    "Why is the sky blue?",
    "Name three animals that sleep in winter.",
    "How many days does a leap year have, and why?",
    "What does a compiler do?",
    "Who wrote 'Pride and Prejudice'?",
    "Explain what a prime number is to a child.",
    "Which planet is the largest of our solar system?",
    "What is the difference between weather and climate?",
    "How do I boil an egg so that its yolk stays soft?",
    "What is photosynthesis?",
    "List the seven colours of the rainbow in order.",
    "What should I take with me on a hike in the mountains?",
    "How does a vaccine work?",
    "Is 91 a prime number?",
    "What is the boiling point of water in degrees Fahrenheit?",
    f"What does this Python code do?\n\n```python\n{_EXPLAIN}\n```",
    "Write a SQL query that counts the rows of a table named users.",
    "Write a bash command that finds all files larger than 10 MB.",
    "Reverse a string in JavaScript.",
    "Write a C function that swaps two integers through pointers.",
    "What is wrong here: `for i in range(10) print(i)`?",
    "Write a regular expression that matches a date such as 2024-05-06.",
    "Sort the list [3, 1, 2] in Python, largest first.",
    "Write an HTML page with a heading and one paragraph.",
    "Explain recursion with an example in Python.",
    f"Give a title to this text:\n\n{_PASSAGE}",
    f"What came first according to the text, the chain or the pedals?\n\n{_PASSAGE}",
    f"Summarize this conversation:\n\n{_MEETING}",
    f"Where and when do they meet?\n\n{_MEETING}",
    f"Rewrite the text for a ten-year-old:\n\n{_PASSAGE}",
    f"List the years that are in the text:\n\n{_PASSAGE}",
    f"What does Anna bring?\n\n{_MEETING}",
    "Summarize the story of Cinderella in three sentences.",
    f"Translate the first sentence to French:\n\n{_PASSAGE}",
    f"Is the following text about cooking? Answer yes or no.\n\n{_PASSAGE}",
    "Hello, who are you?",
    "Tell me a joke about computers.",
    "Write a short poem about the rain.",
    "I want to learn the guitar. Where do I start?",
    "Write a polite e-mail that moves a meeting to Friday.",
    "Tell me a story about a fox and a well.",
    "My friend is sad. What can I say to her?",
    "Give me a name for a black cat.",
    "¿Cómo se dice 'good morning' en español?",
    "用一句话介绍一下长城。",
]
