"""Training in several processes that torch's launcher started (`torchrun --nproc-per-node 2 ...`), on one machine or on several.

Every process draws each whole batch, so that order and augmentation are those of one process, and keeps its part; one all_reduce a step then brings
gradients, batch norm's running statistics and metrics to their means over the batch. Without batch norm and random draws inside the step, that is
what one process computes, up to rounding. Batch norm in train mode sees the process's own part only; dropout and the noise of attacks are drawn from
generators that differ by process. The weights are the same bits in all processes at any time."""

import os
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase


def processes() -> tuple[int, int]:
    """The rank and number of the processes of this group, or of those that torchrun started, which meet here at the first call; otherwise (0, 1)."""
    if not distributed.is_available() or not (distributed.is_initialized() or distributed.is_torchelastic_launched()):
        return 0, 1
    if not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(timeout=timedelta(hours=1))  # by default gloo for what is on the CPU and NCCL for CUDA
    return distributed.get_rank(), distributed.get_world_size()


def first(value):
    """The value that the first process gives, in all of them."""
    box = [value]
    if processes()[1] > 1:
        distributed.broadcast_object_list(box)
    return box[0]


def alike(model: nn.Module) -> None:
    """Give the model the state that it has in the first process."""
    rank, number = processes()
    if number > 1:
        model.load_state_dict(first(None if rank else {k: v.cpu() for k, v in model.state_dict().items()}))


def part(n: int) -> tuple[slice, float]:
    """Which of a batch's n images this process takes, and their share of the batch. A process for which there is none takes the first with share 0:
    it then does what the others do."""
    rank, number = processes()
    count = len(range(rank, n, number))
    return (slice(rank, None, number), count / n) if count else (slice(1), 0.0)


def average(model: nn.Module, parameters: list[nn.Parameter], values: dict, share: float) -> dict[str, Tensor]:
    """Gradients and the running statistics of batch norm in train mode become their means over the processes, weighted by `share`; so do the values
    returned. By hand, as DistributedDataParallel wants one forward pass of its wrapper a step, while steps pass the model, or parts of it, several
    times and freeze its parameters in between."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.running_mean is not None]
    means = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=values["loss"].device).detach() for v in values.values()])
    tensors = [*(p.grad for p in parameters if p.grad is not None), *(b for m in norms for b in (m.running_mean, m.running_var)), means]
    flat = torch.cat([t.flatten() for t in tensors]).mul_(share)
    distributed.all_reduce(flat)
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))
    return dict(zip(values, means))


def leave() -> None:
    """Part from the other processes, when all is done: NCCL warns of those that go without."""
    if processes()[1] > 1:
        distributed.destroy_process_group()
