"""PyTorch: channels-last, fused Adam, data resident as tensors, bfloat16 by autocast.

Pooling comes before the ReLU, which gives the same and costs less. On CPU the step runs eagerly: `torch.compile` took
twice as long (torch 2.13). On CUDA the compiled step is captured as one CUDA graph, which is then replayed.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from experiments.contenders import LEARNING_RATE, Task

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_LAYOUT = torch.channels_last


def describe() -> str:
    return f"torch {torch.__version__}, on {torch.cuda.get_device_name() if _DEVICE == 'cuda' else 'CPU'}"


def _network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def make(task: Task) -> Callable[[int], float]:
    torch.manual_seed(0)
    on_cuda = _DEVICE == "cuda"
    model = _network().to(_DEVICE, memory_format=_LAYOUT)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True, capturable=on_cuda)
    images = torch.from_numpy(task.images)[:, None].to(_DEVICE)
    labels = torch.from_numpy(task.labels).long().to(_DEVICE)
    total = torch.zeros((), device=_DEVICE)

    def loss_fn(rows):
        with torch.autocast(_DEVICE, torch.bfloat16, enabled=task.dtype == "bfloat16"):
            logits = model(images[rows].to(torch.float32, memory_format=_LAYOUT).div_(255))
        return F.cross_entropy(logits.float(), labels[rows])

    loss_of = torch.compile(loss_fn) if on_cuda else loss_fn

    def train_step(rows):
        optimizer.zero_grad()
        loss = loss_of(rows)
        loss.backward()
        optimizer.step()
        total.add_(loss.detach())

    run = _captured(train_step, task.batch_size) if on_cuda else train_step
    step = 0

    def train(steps: int) -> float:
        nonlocal step
        total.zero_()
        for rows in torch.from_numpy(task.rows(step, steps)).to(_DEVICE):
            run(rows)
        step += steps
        return total.item() / steps  # waits

    return train


def _captured(train_step: Callable, batch_size: int) -> Callable:
    """The step as a CUDA graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture).

    Capturing needs a few steps of warm-up, all on the first example; they count for nothing in speed.
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
