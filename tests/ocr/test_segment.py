import numpy as np
import pytest

from mnist_flax.ocr import segment


def test_the_cheapest_path_is_that_of_least_cost():
    """Against every path, tried one by one."""
    rng = np.random.default_rng(0)
    image = np.zeros((28, 28), np.uint8)
    for _ in range(50):
        count = int(rng.integers(1, 6))
        spans = [
            segment.Span(first, stop, (0, 0, int(rng.integers(5, 60)), 40), image, float(rng.integers(0, 3)), 1)
            for first in range(count)
            for stop in range(first + 1, min(count, first + 3) + 1)
        ]
        scores = -rng.exponential(0.5, len(spans))

        def cost(path, spans=spans, scores=scores) -> float:
            return sum(-segment.DOUBT * scores[i] + segment.penalty(spans[i], 40) for i in path)

        def paths(place, spans=spans, count=count):
            if place == count:
                yield []
            for i, span in enumerate(spans):
                if span.first == place:
                    yield from ([i, *rest] for rest in paths(span.stop))

        best = segment.best_path(spans, scores, 40)
        assert cost(best) == pytest.approx(min(map(cost, paths(0))))
