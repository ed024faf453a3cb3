"""PyTorch: channels-last, fused Adam, data resident as tensors, bfloat16 by autocast.

On CUDA the whole step, compiled by `torch.compile`, is captured in one CUDA graph and replayed.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from experiments.contenders import LEARNING_RATE, Task

COMPILE = bool(os.environ.get("TC"))
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def describe() -> str:
    return f"torch {torch.__version__}"


def _network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def make(task: Task) -> Callable[[int], float]:
    torch.manual_seed(0)
    cuda = _DEVICE == "cuda"
    model = _network().to(_DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True, capturable=cuda)
    images = torch.from_numpy(task.images)[:, None].to(_DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(task.labels).long().to(_DEVICE)
    total = torch.zeros((), device=_DEVICE)
    autocast = torch.autocast(_DEVICE, torch.bfloat16) if task.dtype == "bfloat16" else nullcontext()

    def loss_fn(rows):
        with autocast:
            logits = model(images[rows].float().div_(255).contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), labels[rows])

    compiled = torch.compile(loss_fn) if COMPILE else loss_fn

    def train_step(rows):
        loss = compiled(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total.add_(loss.detach())

    if cuda:
        train_step = _captured(train_step, task.batch_size)
    step = 0

    def train(steps: int) -> float:
        nonlocal step
        total.zero_()
        for rows in torch.from_numpy(task.rows(step, steps)).to(_DEVICE):
            train_step(rows)
        step += steps
        return total.item() / steps

    return train


def _captured(train_step: Callable, batch_size: int) -> Callable:
    """One CUDA graph of a step, replayed with other rows.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """
    static_rows = torch.zeros(batch_size, dtype=torch.int32, device=_DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train_step(static_rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(static_rows)

    def replay(rows):
        static_rows.copy_(rows)
        graph.replay()

    return replay


def multiply(size: int, dtype: str) -> Callable[[], None]:
    matrix = torch.full((size, size), 0.01, dtype=getattr(torch, dtype), device=_DEVICE)
    return lambda: (matrix @ matrix)[0, 0].item()  # which waits for the device
