"""AdamW over all tensors of a model: clipping, the update, the working copies and the averages in two passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stdit_fast import _cuda
from stdit_fast.ops import registry

NAME = "adamw"
_NORM_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def _choose() -> tuple[str, str]:
    available, reason = _cuda.available()
    if available:
        return "cuda", reason
    return ("library" if torch.cuda.is_available() else registry.REFERENCE), reason


registry.declare(NAME, _choose)


@dataclass(frozen=True)
class Hyperparameters:
    """What a step needs beside its tensors.

    Attributes:
        lr, betas, eps, weight_decay: as torch.optim.AdamW's (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).
        max_norm: of the gradient of all tensors together; infinity: no clipping.
        average_decay: the averages' share that stays, 0 to 1.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_norm: float = math.inf
    average_decay: float = 1.0


class AdamWStep:
    """The tensors of an optimizer, and its step over them, which changes them in place.

    Without averages the two passes move 30 bytes an element where gradients and working copies are bfloat16: 2 in the
    first; in the second the gradient (2), master and moments in and out (24), the copy out (2). Averages cost 8 more.

    On one GPU that the CUDA library serves, a step reads nothing back: whether it is skipped, and by how much gradients
    are clipped, is decided on the device. The kernels and the plain definition give the same bits (but for the powers
    of the betas, of which a library may round the last bit of 53 otherwise). All steps belong on one stream. On other
    GPUs PyTorch's fused AdamW and one pass for each of the rest do it, and the decision is read back.

    Args:
        masters: the weights, float32 (the definition also takes float64).
        exp_avgs, exp_avg_sqs: the moments, like the masters.
        steps: [n] float32, updates of each tensor so far.
        averages: moving averages of the masters, like these, or None.
        working: bfloat16 copies of the masters, of their sizes, or None.

    Raises:
        ValueError: tensors that do not fit together.
    """

    def __init__(
        self,
        masters: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Tensor,
        averages: Sequence[Tensor] | None = None,
        working: Sequence[Tensor] | None = None,
    ):
        self.masters, self.exp_avgs, self.exp_avg_sqs = list(masters), list(exp_avgs), list(exp_avg_sqs)
        self.steps = steps
        self.averages = None if averages is None else list(averages)
        self.working = None if working is None else list(working)
        self._check()
        self._sizes = [master.numel() for master in self.masters]
        self._kinds = {(d, self.steps.device, True) for d in (torch.bfloat16, torch.float32, torch.float64)}
        self._kernel = _Kernel(self) if self._one_gpu() else None

    @torch.no_grad()
    def square_sum(self, grads: Sequence[Tensor | None]) -> Tensor:
        """The sum of the squares of all gradients, computed in float64.

        Args:
            grads: one for each tensor, of its size, bfloat16 or float32 and contiguous; None where there is none.

        Returns:
            0-dimensional float64 tensor on the tensors' device.

        Raises:
            ValueError: gradients that do not fit.
        """
        self._check_gradients(grads)
        if self._kernel is not None:
            return self._kernel.square_sum(grads)
        return square_sum_definition(grads, self.steps.device)

    @torch.no_grad()
    def update(
        self, grads: Sequence[Tensor | None], square_sum: Tensor, loss: Tensor | None, settings: Hyperparameters
    ) -> None:
        """The step, or nothing at all where `square_sum` or `loss` is not finite.

        Args:
            grads: those of the last call of `square_sum`.
            square_sum: what that returned, or the sum of several processes', float64.
            loss: float64, 0-dimensional; None: the gradients decide alone.

        Raises:
            ValueError: a decay outside 0 to 1.
        """
        if not 0.0 <= settings.average_decay <= 1.0:
            raise ValueError(f"{NAME}: average_decay is {settings.average_decay}, expected 0 to 1")
        if self._kernel is not None:
            self._kernel.update(square_sum, loss, settings)
        elif self.steps.is_cuda and self.masters[0].dtype == torch.float32:
            library_step(self, grads, square_sum, loss, settings)
        else:
            definition(self, grads, square_sum, loss, settings)

    def _check(self) -> None:
        lists = {"exp_avgs": self.exp_avgs, "exp_avg_sqs": self.exp_avg_sqs}
        if self.averages is not None:
            lists["averages"] = self.averages
        if self.working is not None:
            lists["working"] = self.working
        for name, tensors in lists.items():
            if len(tensors) != len(self.masters):
                raise ValueError(f"{NAME}: {len(tensors)} {name} for {len(self.masters)} masters")
        if self.steps.dtype != torch.float32 or self.steps.shape != (len(self.masters),):
            found = f"{self.steps.dtype} {list(self.steps.shape)}"
            raise ValueError(f"{NAME}: steps is {found}, expected torch.float32 [{len(self.masters)}]")
        for i, master in enumerate(self.masters):
            if master.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{NAME}: masters[{i}] is {master.dtype}, expected torch.float32")
            if not master.is_contiguous():
                raise ValueError(f"{NAME}: masters[{i}] must be contiguous")
            for name, tensors in lists.items():
                dtype = torch.bfloat16 if name == "working" else master.dtype
                self._check_like(f"{name}[{i}]", tensors[i], master, (dtype,))

    def _check_gradients(self, grads: Sequence[Tensor | None]) -> None:
        if len(grads) != len(self.masters):
            raise ValueError(f"{NAME}: {len(grads)} gradients for {len(self.masters)} masters")
        kinds = {(grad.dtype, grad.device, grad.is_contiguous()) for grad in grads if grad is not None}
        dtypes = {dtype for dtype, *_ in kinds}
        if len(dtypes) > 1:
            raise ValueError(f"{NAME}: gradients of several dtypes, {', '.join(sorted(map(str, dtypes)))}")
        sizes = (size if grad is None else grad.numel() for grad, size in zip(grads, self._sizes, strict=True))
        if len(kinds) == 1 and not kinds - self._kinds and all(map(int.__eq__, sizes, self._sizes)):
            return  # which is quick, unlike looking for the one that does not fit
        for i, (grad, master) in enumerate(zip(grads, self.masters, strict=True)):
            if grad is not None:
                self._check_like(f"grads[{i}]", grad, master, (torch.bfloat16, torch.float32, torch.float64))

    @staticmethod
    def _check_like(name: str, tensor: Tensor, master: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        if tensor.numel() != master.numel():
            raise ValueError(f"{NAME}: {name} has {tensor.numel()} elements, its master {master.numel()}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{NAME}: {name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        if tensor.device != master.device:
            raise ValueError(f"{NAME}: {name} is on {tensor.device}, its master on {master.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{NAME}: {name} must be contiguous")

    def _one_gpu(self) -> bool:
        if any(master.dtype != torch.float32 for master in self.masters) or not any(self._sizes):
            return False
        devices = {tensor.device for tensor in (*self.masters, self.steps)}
        device = next(iter(devices))
        return len(devices) == 1 and device.type == "cuda" and _cuda.available(device.index)[0]


def square_sum_definition(grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """The sum of squares in plain PyTorch."""
    squares = [grad.double().square().sum() for grad in grads if grad is not None]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)


def definition(
    tensors: AdamWStep,
    grads: Sequence[Tensor | None],
    square_sum: Tensor,
    loss: Tensor | None,
    settings: Hyperparameters,
) -> None:
    """The step in plain PyTorch: float64 rounded once, but for the quotient of the moments."""
    clip = _clip_factor(square_sum, loss, settings)
    if clip is None:
        return
    (beta1, beta2), lr = settings.betas, settings.lr
    steps = tensors.steps.tolist()
    for i, (master, grad) in enumerate(zip(tensors.masters, grads, strict=True)):
        if grad is not None:
            steps[i] += 1
            exp_avg, exp_avg_sq = tensors.exp_avgs[i], tensors.exp_avg_sqs[i]
            grad = grad.view(master.shape).double() * clip
            exp_avg.copy_(_lerp(exp_avg, grad, 1 - beta1))
            exp_avg_sq.copy_(_lerp(exp_avg_sq, grad * grad, 1 - beta2))
            # In float64, which some libraries' float32 root is not as good as when it is rounded.
            root = exp_avg_sq.double().sqrt().to(master.dtype) * (1 / math.sqrt(1 - beta2 ** steps[i])) + settings.eps
            direction = (exp_avg / root).double()
            decayed = master.double() * (1 - lr * settings.weight_decay)
            master.copy_(decayed - direction * (lr / (1 - beta1 ** steps[i])))
            if tensors.working is not None:
                tensors.working[i].copy_(master.view(tensors.working[i].shape))
        if tensors.averages is not None:
            average = tensors.averages[i]
            average.copy_(_lerp(average, master.double(), 1 - settings.average_decay))
    tensors.steps.copy_(torch.tensor(steps, dtype=torch.float32))


def library_step(
    tensors: AdamWStep,
    grads: Sequence[Tensor | None],
    square_sum: Tensor,
    loss: Tensor | None,
    settings: Hyperparameters,
) -> None:
    """The step by PyTorch's own kernels for many tensors, in float32: for GPUs that ours do not serve."""
    clip = _clip_factor(square_sum, loss, settings)
    if clip is None:
        return
    served = [i for i, grad in enumerate(grads) if grad is not None]
    if served:
        steps = tensors.steps.unbind()
        columns = (tensors.masters, tensors.exp_avgs, tensors.exp_avg_sqs, steps)
        masters, exp_avgs, exp_avg_sqs, steps = ([column[i] for i in served] for column in columns)
        clipped = [grads[i].view(tensors.masters[i].shape).to(torch.float32, copy=True) for i in served]
        torch._foreach_mul_(clipped, clip)
        beta1, beta2 = settings.betas
        adamw(
            masters, clipped, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=settings.lr, weight_decay=settings.weight_decay, eps=settings.eps,
        )  # fmt: skip
        if tensors.working is not None:
            working = [tensors.working[i].view(tensors.masters[i].shape) for i in served]
            torch._foreach_copy_(working, masters)
    if tensors.averages is not None:
        torch._foreach_lerp_(tensors.averages, tensors.masters, 1 - settings.average_decay)


def _clip_factor(square_sum: Tensor, loss: Tensor | None, settings: Hyperparameters) -> float | None:
    """What gradients are multiplied by, or None for a step that is not finite; read from the device."""
    values = square_sum.reshape(1) if loss is None else torch.stack([square_sum, loss])
    square, *others = values.tolist()
    if not all(map(math.isfinite, (square, *others))):
        return None
    return min(1.0, settings.max_norm / (math.sqrt(square) + _NORM_EPSILON))


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    start = start.double()
    return start + (end - start) * weight


class _Kernel:
    """The CUDA kernels over one optimizer's tensors, whose addresses go to the device once."""

    def __init__(self, tensors: AdamWStep):
        library = _cuda.library()
        self._dtypes = {torch.float32: library.FLOAT32, torch.bfloat16: library.BFLOAT16}
        self._device = tensors.masters[0].device
        count = len(tensors.masters)
        nothing = [None] * count
        columns = (tensors.masters, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.averages, tensors.working)
        addresses = [[_address(tensor) for tensor in column or nothing] for column in columns]
        table = torch.tensor([*addresses, tensors._sizes], dtype=torch.int64).T.contiguous()
        tiles = torch.cat([_tiles(i, size, library.ADAMW_TILE) for i, size in enumerate(tensors._sizes)])
        words = 3 * count + len(tiles) + 2
        # What the library keeps addresses of.
        self._kept = (
            table.to(self._device),
            tiles.to(self._device),
            tensors.steps,
            torch.empty(words, dtype=torch.int64, device=self._device),
        )
        self._library = library.AdamW(
            **dict(zip(("tensors", "tiles", "steps", "scratch"), (t.data_ptr() for t in self._kept), strict=True)),
            count=count,
            tile_count=len(tiles),
            device=self._device.index,
        )
        self._grad_dtype = library.FLOAT32

    def square_sum(self, grads: Sequence[Tensor | None]) -> Tensor:
        dtype = next((grad.dtype for grad in grads if grad is not None), torch.float32)
        if dtype not in self._dtypes:
            raise ValueError(f"{NAME}: gradients are {dtype}, expected torch.bfloat16 or torch.float32")
        self._grad_dtype = self._dtypes[dtype]
        total = torch.empty((), dtype=torch.float64, device=self._device)
        self._library.square_sum(
            grads=[self._gradient(grad) for grad in grads],
            grad_dtype=self._grad_dtype,
            square_sum=total.data_ptr(),
            stream=self._stream(),
        )
        return total

    def update(self, square_sum: Tensor, loss: Tensor | None, settings: Hyperparameters) -> None:
        for name, value in (("square_sum", square_sum), ("loss", loss)):
            if value is not None and (value.dtype, value.device, value.numel()) != (torch.float64, self._device, 1):
                raise ValueError(f"{NAME}: {name} must be one float64 value on {self._device}")
        self._library.update(
            grad_dtype=self._grad_dtype,
            square_sum=_address(square_sum),
            loss=_address(loss),
            lr=settings.lr,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            epsilon=settings.eps,
            weight_decay=settings.weight_decay,
            max_norm=settings.max_norm,
            average_decay=settings.average_decay,
            stream=self._stream(),
        )

    def _gradient(self, grad: Tensor | None) -> int:
        """A gradient's address, null only where there is none: an empty tensor has any, which nothing reads."""
        return 0 if grad is None else grad.data_ptr() or self._kept[0].data_ptr()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tiles(index: int, size: int, tile: int) -> Tensor:
    """[number of tiles, 2] int32: the tensor's index, and each tile's place in it."""
    places = torch.arange(-(-size // tile), dtype=torch.int32)
    return torch.stack([torch.full_like(places, index), places], dim=1)
