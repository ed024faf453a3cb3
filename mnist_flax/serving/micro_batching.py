"""Many callers, one forward pass: what arrives while the network works is its next batch."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any

import numpy as np
from jaxtyping import Float

from mnist_flax.inference.classifier import Classify, Images
from mnist_flax.inference.predictor import BATCH_SIZES

Scores = Float[np.ndarray, "digits classes"]


def make_batcher(classifier: Classify, executor: Executor) -> Callable[[Images], Coroutine[Any, Any, Scores]]:
    """An asynchronous classifier, for any number of concurrent callers on one event loop.

    A call that finds the network idle starts at once; those that come while it works are put together, up to the
    largest of `BATCH_SIZES`, so no one ever waits for a batch to fill. An exception of a pass reaches all its callers.
    """
    waiting: list[tuple[Images, asyncio.Future[Scores]]] = []
    worker: asyncio.Task | None = None

    def take() -> list[tuple[Images, asyncio.Future[Scores]]]:
        """The first of those that wait, as many as fit into a batch; one at least."""
        stop, total = 0, 0
        while stop < len(waiting) and (not stop or total + len(waiting[stop][0]) <= BATCH_SIZES[-1]):
            total += len(waiting[stop][0])
            stop += 1
        taken = waiting[:stop]
        del waiting[:stop]
        return [(images, future) for images, future in taken if not future.done()]  # whose caller has not left

    async def work() -> None:
        await asyncio.sleep(0)  # callers of the same turn of the loop go together
        while waiting:
            batch = take()
            if not batch:
                continue
            try:
                images = np.concatenate([images for images, _ in batch])
                scores = await asyncio.get_running_loop().run_in_executor(executor, classifier, images)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            start = 0
            for part, future in batch:
                if not future.done():
                    future.set_result(scores[start : start + len(part)])
                start += len(part)

    async def recognise(images: Images) -> Scores:
        nonlocal worker
        future = asyncio.get_running_loop().create_future()
        waiting.append((images, future))
        if worker is None or worker.done():
            worker = asyncio.create_task(work())
        return await future

    return recognise
