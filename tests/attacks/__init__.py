"""Attacks: conditions that training meets and tests of single calls do not, for a long time or in large numbers.

    python -m tests.attacks interrupts       # signals at random moments inside a call of the loss
    python -m tests.attacks distributed      # ranks that die, fail, run out of batches or have uneven ones
    python -m tests.attacks memory           # thousands of steps of every method

Each attack has cases and a verdict for each of them; `tests.attacks.attack` defines both.
"""
