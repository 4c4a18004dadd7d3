"""Inventory of NVIDIA GPUs through NVML: UUID, kind, memory, health, MIG slices, NVLink islands, and what others use.

Used by `local_nodes`. Every call may be unsupported on some GPU or driver; what cannot be told is taken for fine. A
machine without NVIDIA GPUs or drivers has none, which is no error.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jobsched.core.node import Gpu
from jobsched.core.resources import GpuId, GpuShare

GIB = 2**30
_SOLD_GIB = (2, 3, 4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 94, 96, 141, 144, 180, 192, 288)
_NOISE = re.compile(r"^(nvidia|geforce|graphics device|tesla|quadro)\s+|\s+(pcie|sxm\d?|hbm\d*e?|nvl|oem|\d+\s?gb)\b",
                    re.IGNORECASE)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Inventory:
    """The GPUs of this machine, and those in use by processes that are not ours."""

    gpus: tuple[Gpu, ...] = ()
    foreign: tuple[GpuShare, ...] = ()
    message: str = ""
    """What is wrong with GPUs that are not healthy."""


Ours = Callable[[int], bool]
"""Whether a process, by its pid, belongs to a replica of ours."""


def nobody(pid: int) -> bool:
    """No process is ours."""
    return False


def read_inventory(ours: Ours = nobody, nvml: Any = None) -> Inventory:
    """What there is now. `nvml`: module pynvml or something like it."""
    try:
        nvml = nvml or _pynvml()
        nvml.nvmlInit()
    except Exception:  # no library, no driver, no GPU: NVML says it in many ways
        return Inventory()
    try:
        return _Reader(nvml, ours).read()
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def gpu_kind(name: str, memory_bytes: int) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100-80gb`; the size is the one printed on the box, so it tells variants apart."""
    printed = re.search(r"(\d+)\s?GB\b", name, re.IGNORECASE)
    size = int(printed[1]) if printed else _marketing_gib(memory_bytes)
    previous, short = "", name
    while previous != short:
        previous, short = short, _NOISE.sub("", short.strip())
    model = re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-") or "gpu"
    return f"{model}-{size}gb" if size and not model.endswith(f"-{size}gb") else model


def _marketing_gib(memory_bytes: int) -> int:
    """Drivers report a little less than what is sold (79.6 for 80): the next size that is sold, else whole GiB."""
    whole = -(-memory_bytes // GIB)
    return next((size for size in _SOLD_GIB if whole <= size <= whole * 1.15), whole)


class _Reader:
    """One reading; `nvml` is initialised."""

    def __init__(self, nvml: Any, ours: Ours) -> None:
        self.nvml, self.ours = nvml, ours
        self.gpus: list[Gpu] = []
        self.foreign: list[GpuShare] = []
        self.problems: list[str] = []
        self.whole: dict[GpuId, Any] = {}
        """Handles of GPUs that are not cut into slices; slices have no NVLink."""

    def read(self) -> Inventory:
        for index in range(self.ask(self.nvml.nvmlDeviceGetCount, otherwise=0)):
            try:
                handle = self.nvml.nvmlDeviceGetHandleByIndex(index)
            except self.nvml.NVMLError as error:  # fallen off the bus: it has no UUID that we could report
                self.problems.append(f"GPU {index}: {error}")
                continue
            slices = list(self.slices(handle)) if self.mig(handle) else None
            if slices is None:
                self.add(handle, self.kind(handle), handle)
            for slice_handle in slices or ():
                self.add(slice_handle, self.slice_kind(handle, slice_handle), handle)
        islands = self.islands()
        gpus = tuple(replace(gpu, island=islands.get(gpu.id, "")) for gpu in self.gpus)
        return Inventory(gpus, tuple(self.foreign), "; ".join(self.problems))

    def islands(self) -> dict[GpuId, str]:
        """The island of each GPU, where NVLink (or a switch of it) joins some of them but not all."""
        groups: list[dict[GpuId, Any]] = []
        for gpu, handle in self.whole.items():
            joined = [group for group in groups if any(self.linked(handle, other) for other in group.values())]
            groups = [group for group in groups if group not in joined]
            groups.append({each: its for group in joined for each, its in group.items()} | {gpu: handle})
        if len(groups) < 2 or len(groups) == len(self.whole):
            return {}
        return {gpu: f"nvlink-{number}" for number, group in enumerate(groups) for gpu in group}

    def linked(self, one: Any, other: Any) -> bool:
        nvml = self.nvml
        status = self.ask(nvml.nvmlDeviceGetP2PStatus, one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK, otherwise=None)
        return bool(status == nvml.NVML_P2P_STATUS_OK)

    def add(self, handle: Any, kind: str, device: Any) -> None:
        """`device` is the whole GPU, which is what health is known of; the same as `handle` without MIG."""
        uuid = _text(self.ask(self.nvml.nvmlDeviceGetUUID, handle, otherwise=""))
        if not uuid:
            return
        problem = self.problem(device)
        if problem:
            self.problems.append(f"{uuid}: {problem}")
        gpu = GpuId(uuid)
        self.gpus.append(Gpu(gpu, kind, self.memory(handle), healthy=not problem))
        if handle is device:
            self.whole[gpu] = handle
        if not all(map(self.ours, self.pids(handle))):
            self.foreign.append(GpuShare(gpu))

    def mig(self, handle: Any) -> bool:
        return bool(self.ask(self.nvml.nvmlDeviceGetMigMode, handle, otherwise=(0, 0))[0] == 1)

    def slices(self, handle: Any) -> Iterator[Any]:
        for index in range(self.ask(self.nvml.nvmlDeviceGetMaxMigDeviceCount, handle, otherwise=0)):
            found = self.ask(self.nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index, otherwise=None)
            if found is not None:
                yield found

    def kind(self, handle: Any) -> str:
        return gpu_kind(_text(self.ask(self.nvml.nvmlDeviceGetName, handle, otherwise="gpu")), self.memory(handle))

    def slice_kind(self, device: Any, handle: Any) -> str:
        """`h100-80gb:1g.10gb`: the profile is the tail of the slice's name, `NVIDIA H100 80GB HBM3 MIG 1g.10gb`."""
        name = _text(self.ask(self.nvml.nvmlDeviceGetName, handle, otherwise=""))
        profile = name.rpartition("MIG ")[2].strip().lower() if "MIG " in name else f"{self.memory(handle) // GIB}gb"
        return f"{self.kind(device)}:{profile}"

    def memory(self, handle: Any) -> int:
        info = self.ask(self.nvml.nvmlDeviceGetMemoryInfo, handle, otherwise=None)
        return int(info.total) if info is not None else 0

    def pids(self, handle: Any) -> set[int]:
        """Processes that compute on it. On a desktop the display's own are not counted."""
        return {int(p.pid) for p in self.ask(self.nvml.nvmlDeviceGetComputeRunningProcesses, handle, otherwise=())}

    def problem(self, handle: Any) -> str:
        """Why a GPU must not be used; empty when it may. What the GPU has healed by itself does not count."""
        nvml = self.nvml
        remapped = self.ask(nvml.nvmlDeviceGetRemappedRows, handle, otherwise=None)
        if remapped is not None and remapped[3]:
            return "row remapping has failed: replace the GPU"
        if remapped is not None and remapped[2]:
            return "row remapping is pending: reset the GPU"
        if self.ask(nvml.nvmlDeviceGetRetiredPagesPendingStatus, handle, otherwise=0):
            return "page retirement is pending: reset the GPU"
        uncorrected = self.ask(
            nvml.nvmlDeviceGetTotalEccErrors, handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC,
            otherwise=0,
        )
        if uncorrected:
            return f"{uncorrected} uncorrected ECC errors since the driver was loaded"
        return self.lost(handle)

    def lost(self, handle: Any) -> str:
        """After a fatal Xid (79: fallen off the bus) a GPU answers every question with GPU_IS_LOST or the like."""
        try:
            self.nvml.nvmlDeviceGetTemperature(handle, self.nvml.NVML_TEMPERATURE_GPU)
        except self.nvml.NVMLError as error:
            if getattr(error, "value", None) in (
                self.nvml.NVML_ERROR_GPU_IS_LOST, self.nvml.NVML_ERROR_RESET_REQUIRED, self.nvml.NVML_ERROR_UNKNOWN,
            ):
                return str(error)
        return ""

    def ask(self, call: Callable[..., _T], *args: Any, otherwise: Any) -> Any:
        """The answer, or `otherwise` when this GPU or driver has none."""
        try:
            return call(*args)
        except self.nvml.NVMLError:
            return otherwise


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _pynvml() -> Any:
    import pynvml  # loads a shared library: only where GPUs are looked for

    return pynvml


def is_real(gpu: str) -> bool:
    """Whether CUDA would know this id; false for the GPUs of virtual nodes."""
    return gpu.startswith(("GPU-", "MIG-"))


def visible_devices(gpus: Iterable[GpuShare]) -> str:
    """CUDA_VISIBLE_DEVICES for these: real ones by UUID, in order; empty hides every GPU."""
    return ",".join(share.gpu for share in gpus if is_real(share.gpu))
