"""PyTorch: channels-last, fused Adam, data resident as tensors, bfloat16 by autocast.

Pooling comes before the ReLU, which gives the same and costs less. On CPU the step runs eagerly: `torch.compile` took
twice as long (torch 2.13). On CUDA `STEPS` compiled steps are captured as one CUDA graph, which is then replayed; cuDNN
times its algorithms, and products of float32 are TF32, as JAX's are there.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from mnist_flax.experiments.benchmarks.contenders import LEARNING_RATE, STEPS, Task

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_LAYOUT = torch.channels_last


def describe() -> str:
    return f"torch {torch.__version__}, on {torch.cuda.get_device_name() if _DEVICE == 'cuda' else 'CPU'}"


def _network(batch_norm: bool) -> nn.Module:
    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm), *norm, nn.MaxPool2d(2), nn.ReLU()]

    dense = (nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(*convolution(1, 32), *convolution(32, 64), *dense)


def make(task: Task) -> Callable[[int], float]:
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if _DEVICE == "cuda" else "highest")
    on_cuda = _DEVICE == "cuda"
    model = _network(task.batch_norm).to(_DEVICE, memory_format=_LAYOUT)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True, capturable=on_cuda)
    images = torch.from_numpy(task.images)[:, None].to(_DEVICE)
    labels = torch.from_numpy(task.labels).long().to(_DEVICE)
    total = torch.zeros((), device=_DEVICE)

    def loss_fn(rows):
        with torch.autocast(_DEVICE, torch.bfloat16, enabled=task.dtype == "bfloat16"):
            logits = model(images[rows].to(torch.float32, memory_format=_LAYOUT).div_(255))
        return F.cross_entropy(logits.float(), labels[rows])

    loss_of = torch.compile(loss_fn) if on_cuda else loss_fn

    def train_steps(batches):
        for rows in batches:
            optimizer.zero_grad()
            loss = loss_of(rows)
            loss.backward()
            optimizer.step()
            total.add_(loss.detach())

    run = _captured(train_steps, task.batch_size) if on_cuda else train_steps
    step = 0

    def train(steps: int) -> float:
        nonlocal step
        total.zero_()
        for batches in torch.from_numpy(task.rows(step, steps)).to(_DEVICE).split(STEPS):
            run(batches)
        step += steps
        return total.item() / steps  # waits

    return train


def _captured(train_steps: Callable, batch_size: int) -> Callable:
    """`STEPS` steps as a CUDA graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture).

    Capturing needs a few steps of warm-up, all on the first example; they count for nothing in speed.
    """
    static = torch.zeros((STEPS, batch_size), dtype=torch.int32, device=_DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train_steps(static[:3])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_steps(static)

    def replay(batches, alive=train_steps):  # a graph does not keep the tensors that it reads
        static.copy_(batches)
        graph.replay()

    return replay


def multiply(size: int, dtype: str) -> Callable[[], None]:
    matrix = torch.full((size, size), 0.01, dtype=getattr(torch, dtype), device=_DEVICE)
    return lambda: (matrix @ matrix)[0, 0].item()  # which waits for the device
