"""Few-shot examples in HumanEval's form but not of it: it is too small to give examples away."""

from __future__ import annotations

EXAMPLES: list[dict[str, str]] = [
    {
        "task_id": "Example/0",
        "prompt": '''def count_even(numbers: list[int]) -> int:
    """Count the even numbers in a list.
    >>> count_even([1, 2, 4])
    2
    """
''',
        "canonical_solution": "    return sum(1 for number in numbers if number % 2 == 0)\n",
        "test": "def check(candidate):\n    assert candidate([1, 2, 4]) == 2\n    assert candidate([]) == 0\n",
        "entry_point": "count_even",
    },
    {
        "task_id": "Example/1",
        "prompt": '''def initials(name: str) -> str:
    """Return the first letters of the words of a name, in upper case.
    >>> initials("ada lovelace")
    'AL'
    """
''',
        "canonical_solution": '    return "".join(word[0].upper() for word in name.split())\n',
        "test": "def check(candidate):\n    assert candidate('ada lovelace') == 'AL'\n    assert candidate('') == ''\n",
        "entry_point": "initials",
    },
    {
        "task_id": "Example/2",
        "prompt": '''def running_total(amounts: list[int]) -> list[int]:
    """Return the sums of the first one, two, three and so on elements.
    >>> running_total([3, 1, 4])
    [3, 4, 8]
    """
''',
        "canonical_solution": """    totals = []
    total = 0
    for amount in amounts:
        total += amount
        totals.append(total)
    return totals
""",
        "test": "def check(candidate):\n    assert candidate([3, 1, 4]) == [3, 4, 8]\n    assert candidate([]) == []\n",
        "entry_point": "running_total",
    },
    {
        "task_id": "Example/3",
        "prompt": '''def days_in_month(month: int, leap: bool) -> int:
    """Return the number of days of a month, given as 1 to 12.
    >>> days_in_month(2, True)
    29
    """
''',
        "canonical_solution": """    if month == 2:
        return 29 if leap else 28
    return 30 if month in (4, 6, 9, 11) else 31
""",
        "test": "def check(candidate):\n    assert candidate(2, True) == 29\n    assert candidate(12, False) == 31\n",
        "entry_point": "days_in_month",
    },
    {
        "task_id": "Example/4",
        "prompt": '''def longest_run(bits: str) -> int:
    """Return the length of the longest run of equal characters.
    >>> longest_run("00111")
    3
    """
''',
        "canonical_solution": """    best = run = 0
    previous = ""
    for bit in bits:
        run = run + 1 if bit == previous else 1
        best = max(best, run)
        previous = bit
    return best
""",
        "test": "def check(candidate):\n    assert candidate('00111') == 3\n    assert candidate('') == 0\n",
        "entry_point": "longest_run",
    },
]
