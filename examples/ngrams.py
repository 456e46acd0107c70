"""The baselines of the sample model: n-gram models of the same training tokens."""

import numpy as np

VOCABULARY = 4096  # a run of five tokens must fit an int64


def gram_keys(tokens: np.ndarray, order: int) -> np.ndarray:
    """One integer per run of `order` tokens, the last token in its lowest digit (base `VOCABULARY`)."""
    keys = np.zeros(len(tokens) - order + 1, dtype=np.int64)
    for start in range(order):
        keys = keys * VOCABULARY + tokens[start : start + len(keys)]
    return keys


def find(sorted_keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions of `wanted` in `sorted_keys`, and a mask of those that are there."""
    positions = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return positions, sorted_keys[positions] == wanted


class Level:
    """One order of a Kneser-Ney model, with the three discounts of Chen and Goodman (1999)."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray) -> None:
        self.grams = grams
        kinds = np.minimum(counts, 3)
        discounts = self._discounts(counts)[kinds]
        self.contexts, inverse = np.unique(grams // VOCABULARY, return_inverse=True)
        self.totals = np.bincount(inverse, weights=counts)
        self.shares = (counts - discounts) / self.totals[inverse]
        self.backoff = np.bincount(inverse, weights=discounts) / self.totals

    @staticmethod
    def _discounts(counts: np.ndarray) -> np.ndarray:
        """Amounts taken from counts of 0, 1, 2, and 3 or more."""
        seen = np.maximum(np.bincount(np.minimum(counts, 5), minlength=6), 1)
        y = seen[1] / (seen[1] + 2 * seen[2])
        amounts = [0.0] + [k - (k + 1) * y * seen[k + 1] / seen[k] for k in (1, 2, 3)]
        return np.clip(amounts, 0.0, [0.0, 1.0, 2.0, 3.0])

    def refine(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities of the last tokens of `keys`, given those of the next lower order."""
        gram, known_gram = find(self.grams, keys)
        context, known_context = find(self.contexts, keys // VOCABULARY)
        share = np.where(known_gram, self.shares[gram], 0.0)
        return np.where(known_context, share + self.backoff[context] * lower, lower)


class KneserNey:
    """Interpolated modified Kneser-Ney n-gram model; exact counts, because five 12-bit tokens fit one integer."""

    def __init__(self, tokens: np.ndarray, order: int) -> None:
        grams, counts = np.unique(gram_keys(tokens, order), return_counts=True)
        self.levels = [Level(grams, counts)]
        for lower in range(order - 1, 0, -1):  # count in how many contexts an n-gram continues, not how often
            grams, counts = np.unique(grams % VOCABULARY**lower, return_counts=True)
            self.levels.insert(0, Level(grams, counts))

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """Negative log-likelihood of every token given those before it."""
        probabilities = np.full(len(tokens), 1 / VOCABULARY)
        for order, level in enumerate(self.levels, start=1):
            probabilities[order - 1 :] = level.refine(gram_keys(tokens, order), probabilities[order - 1 :])
        return -np.log(probabilities)


def unigram_losses(training: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of every token under the frequencies in `training`, with one added to every count."""
    counts = np.bincount(training, minlength=VOCABULARY) + 1
    return -np.log(counts / counts.sum())[tokens]
