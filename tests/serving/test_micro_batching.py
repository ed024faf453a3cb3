import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mnist_flax.inference.predictor import BATCH_SIZES
from mnist_flax.serving.micro_batching import make_batcher


def numbered(first: int, count: int) -> np.ndarray:
    """Images that carry their numbers in the first two pixels."""
    images = np.zeros((count, 28, 28), np.uint8)
    numbers = np.arange(first, first + count)
    images[:, 0, 0], images[:, 0, 1] = numbers // 256, numbers % 256
    return images


class Network:
    """Gives back the images' numbers, remembers the size of each pass, and may be held up."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.go.wait(10)
        self.sizes.append(len(images))
        if (images[:, 1] == 9).any():
            raise RuntimeError("no such digit")
        return images[:, 0, 0].astype(int) * 256 + images[:, 0, 1]


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_callers_that_come_together_share_a_pass_and_get_their_own(executor):
    network = Network()

    async def scenario():
        recognise = make_batcher(network, executor)
        return await asyncio.gather(*(recognise(numbered(10 * i, 1 + i % 3)) for i in range(32)))

    for i, result in enumerate(asyncio.run(scenario())):
        np.testing.assert_array_equal(result, 10 * i + np.arange(1 + i % 3))
    assert len(network.sizes) == 1


def test_what_comes_during_a_pass_is_the_next_one(executor):
    network = Network()

    async def scenario():
        recognise = make_batcher(network, executor)
        network.go.clear()
        first = asyncio.create_task(recognise(numbered(0, 1)))
        await asyncio.sleep(0.05)
        later = [asyncio.create_task(recognise(numbered(100 + i, 1))) for i in range(20)]
        await asyncio.sleep(0.05)
        network.go.set()
        assert [int(result[0]) for result in await asyncio.gather(first, *later)] == [0, *range(100, 120)]
        assert int((await recognise(numbered(7, 1)))[0]) == 7  # and it starts again

    asyncio.run(scenario())
    assert network.sizes == [1, 20, 1]


def test_a_batch_is_no_larger_than_the_largest_program(executor):
    network = Network()
    size = BATCH_SIZES[-1]

    async def scenario():
        recognise = make_batcher(network, executor)
        return await asyncio.gather(
            *(recognise(numbered(i, size // 2 + 1)) for i in range(3)), recognise(numbered(0, 1))
        )

    results = asyncio.run(scenario())
    assert network.sizes == [size // 2 + 1, size // 2 + 1, size // 2 + 2]
    np.testing.assert_array_equal(results[2], 2 + np.arange(size // 2 + 1))


def test_a_failed_pass_fails_its_callers_and_no_others(executor):
    network = Network()
    bad = numbered(1, 1)
    bad[:, 1] = 9

    async def scenario():
        recognise = make_batcher(network, executor)
        failed = await asyncio.gather(recognise(bad), recognise(numbered(2, 1)), return_exceptions=True)
        assert all(isinstance(error, RuntimeError) for error in failed)
        assert int((await recognise(numbered(3, 1)))[0]) == 3

    asyncio.run(scenario())


def test_images_of_another_shape_fail_their_pass_alone(executor):
    async def scenario():
        recognise = make_batcher(Network(), executor)
        odd = recognise(np.zeros((1, 27, 27), np.uint8))
        failed = await asyncio.gather(recognise(numbered(1, 1)), odd, return_exceptions=True)
        assert all(isinstance(error, ValueError) for error in failed)
        assert int((await recognise(numbered(3, 1)))[0]) == 3

    asyncio.run(scenario())


def test_a_caller_that_leaves_is_not_waited_for(executor):
    network = Network()

    async def scenario():
        recognise = make_batcher(network, executor)
        network.go.clear()
        first = asyncio.create_task(recognise(numbered(0, 1)))
        await asyncio.sleep(0.05)
        gone, stays = (asyncio.create_task(recognise(numbered(i, 1))) for i in (5, 6))
        await asyncio.sleep(0.05)
        gone.cancel()
        first.cancel()
        await asyncio.sleep(0)
        network.go.set()
        assert int((await stays)[0]) == 6

    asyncio.run(scenario())
    assert network.sizes == [1, 1]
