"""Made-up text for the tests: seeded, with line ends, tabs and runs of blanks in it."""

from __future__ import annotations

import random


def make_texts(count: int, seed: int = 0) -> list[str]:
    """``count`` different documents of 5 to 60 words from a vocabulary of 400."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(400)]
    blanks = [" "] * 12 + ["\n", "\n    ", "\t", "  ", ", "]
    texts = []
    for number in range(count):
        parts = [rng.choice(words) + rng.choice(blanks) for _ in range(rng.randint(5, 60))]
        texts.append(f"{number} " + "".join(parts))
    return texts
