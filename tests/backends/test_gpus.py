"""The GPU inventory over a made-up NVML, with everything that real ones refuse to answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jobsched.backends.gpus import gpu_kind, read_inventory, visible_devices
from jobsched.core.resources import GpuId, GpuShare

GIB = 2**30


class FakeNvmlError(Exception):
    def __init__(self, value: int = 3) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class FakeNvml:
    """Devices are dicts; what a device does not have is 'not supported'."""

    NVMLError = FakeNvmlError
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = NVML_TEMPERATURE_GPU = 0
    NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED, NVML_ERROR_UNKNOWN = 15, 16, 999

    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 2, 0

    def __init__(self, *devices: dict[str, Any]) -> None:
        self.devices = devices
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:  # noqa: N802
        if self.devices[index].get("fallen_off"):
            raise FakeNvmlError(15)
        return self.devices[index]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: dict[str, Any], index: int) -> dict[str, Any]:  # noqa: N802
        try:
            return handle["slices"][index]  # type: ignore[no-any-return]
        except IndexError:
            raise FakeNvmlError(6) from None

    def nvmlDeviceGetP2PStatus(self, one: dict[str, Any], other: dict[str, Any], index: int) -> int:  # noqa: N802
        if "links" not in one:
            raise FakeNvmlError()
        assert index == self.NVML_P2P_CAPS_INDEX_NVLINK
        return 0 if other["UUID"] in one["links"] else 1

    def __getattr__(self, name: str) -> Any:
        field = name.removeprefix("nvmlDeviceGet")

        def answer(handle: dict[str, Any], *_: object) -> Any:
            value = handle.get(field, FakeNvmlError())
            if isinstance(value, FakeNvmlError):
                raise value
            return value

        return answer


def a_gpu(uuid: str = "GPU-1", name: str = "NVIDIA H100 80GB HBM3", gib: float = 79.6, **fields: Any) -> dict[str, Any]:
    return {"UUID": uuid, "Name": name, "MemoryInfo": SimpleNamespace(total=int(gib * GIB)), **fields}


@pytest.mark.parametrize(("name", "gib", "kind"), [
    ("NVIDIA H100 80GB HBM3", 79.6, "h100-80gb"), ("NVIDIA H100 PCIe", 79.6, "h100-80gb"),
    ("NVIDIA A100-SXM4-40GB", 39.4, "a100-sxm4-40gb"), ("NVIDIA GeForce RTX 4090", 23.9, "rtx-4090-24gb"),
    ("Tesla T4", 14.7, "t4-16gb"), ("NVIDIA H200", 140.4, "h200-141gb"), ("NVIDIA L4", 22.5, "l4-24gb"),
])
def test_kinds_are_normal(name: str, gib: float, kind: str) -> None:
    assert gpu_kind(name, int(gib * GIB)) == kind


def test_gpus_are_listed_with_uuid_kind_memory_and_health() -> None:
    nvml = FakeNvml(a_gpu(), a_gpu("GPU-2", b"Tesla T4", 14.7))  # type: ignore[arg-type]  # old drivers answer bytes
    inventory = read_inventory(nvml=nvml)
    assert [(g.id, g.kind, g.healthy) for g in inventory.gpus] == [
        ("GPU-1", "h100-80gb", True), ("GPU-2", "t4-16gb", True),
    ]
    assert inventory.gpus[0].memory_bytes == int(79.6 * GIB)
    assert nvml.open == 0, "shut down again"


def test_mig_slices_take_the_place_of_their_gpu() -> None:
    slices = [
        a_gpu("MIG-1", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8), a_gpu("MIG-2", "NVIDIA H100 80GB HBM3", 19.6),
    ]
    inventory = read_inventory(nvml=FakeNvml(a_gpu(MigMode=(1, 1), slices=slices)))
    assert [(g.id, g.kind) for g in inventory.gpus] == [("MIG-1", "h100-80gb:1g.10gb"), ("MIG-2", "h100-80gb:19gb")]


@pytest.mark.parametrize("fault", [
    {"RemappedRows": (1, 0, 1, 0)}, {"RemappedRows": (0, 1, 0, 1)}, {"RetiredPagesPendingStatus": 1},
    {"TotalEccErrors": 2}, {"Temperature": FakeNvmlError(15)},
])
def test_sick_gpus_are_told(fault: dict[str, Any]) -> None:
    inventory = read_inventory(nvml=FakeNvml(a_gpu(**fault), a_gpu("GPU-2", RemappedRows=(3, 0, 0, 0), Temperature=50)))
    assert [g.healthy for g in inventory.gpus] == [False, True]
    assert "GPU-1" in inventory.message


def test_a_gpu_that_has_fallen_off_the_bus_does_not_hide_the_others() -> None:
    inventory = read_inventory(nvml=FakeNvml(a_gpu(fallen_off=True), a_gpu("GPU-2")))
    assert [g.id for g in inventory.gpus] == ["GPU-2"]
    assert "GPU 0" in inventory.message


def test_what_others_compute_on_is_foreign_and_what_ours_do_is_not() -> None:
    first = a_gpu("GPU-1", ComputeRunningProcesses=[SimpleNamespace(pid=77)])
    second = a_gpu("GPU-2", ComputeRunningProcesses=[SimpleNamespace(pid=88)])
    assert read_inventory({77}.__contains__, FakeNvml(first, second)).foreign == (GpuShare(GpuId("GPU-2")),)


def test_no_driver_is_no_gpu() -> None:
    class Nothing(FakeNvml):
        def nvmlInit(self) -> None:  # noqa: N802
            raise FakeNvmlError(12)

    assert read_inventory(nvml=Nothing()).gpus == ()


def test_only_real_gpus_are_shown_to_cuda() -> None:
    shares = [GpuShare(GpuId(g)) for g in ("GPU-b", "MIG-a", "node-0/sim-1")]
    assert visible_devices(shares) == "GPU-b,MIG-a"
    assert visible_devices(shares[2:]) == ""


@pytest.mark.parametrize(
    ("links", "islands"),
    [
        (("B", "A", "D", "C"), ["nvlink-0", "nvlink-0", "nvlink-1", "nvlink-1"]),  # two bridged pairs
        (("B", "AC", "B", ""), ["nvlink-0", "nvlink-0", "nvlink-0", "nvlink-1"]),  # a chain, and one by itself
        (("BCD", "ACD", "ABD", "ABC"), ["", "", "", ""]),  # a switch joins all
        (("", "", "", ""), ["", "", "", ""]),
        ((None, None, None, None), ["", "", "", ""]),  # the driver cannot tell
    ],
)
def test_nvlink_islands(links: tuple[str | None, ...], islands: list[str]) -> None:
    gpus = [
        a_gpu(f"GPU-{name}", **({} if linked is None else {"links": [f"GPU-{each}" for each in linked]}))
        for name, linked in zip("ABCD", links, strict=True)
    ]
    assert [gpu.island for gpu in read_inventory(nvml=FakeNvml(*gpus)).gpus] == islands
