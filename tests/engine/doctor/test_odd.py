"""Strange shapes, types and tables: no check may fall over them, whatever it says."""

from pathlib import Path

import pytest
import torch
from tests.engine.doctor import clinic

from secateur.core.errors import FileError
from secateur.engine.doctor.examining import report_on
from secateur.engine.doctor.mending import mended
from secateur.engine.doctor.opening import Source
from secateur.engine.doctor.subject import Subject

NAMES = (
    "fc.weight", "fc.bias", "fc.weight_orig", "fc.weight_mask", "bn.running_mean", "bn.running_var", "bn.weight",
    "bn.num_batches_tracked", "module.fc.weight", "_orig_mod.fc.weight", "emb.weight", "rnn.weight_ih_l0", "n_averaged",
    "fc.parametrizations.weight.original", "fc.parametrizations.weight.0.mask", "ema.fc.weight", "a.lora_B.weight",
)  # fmt: skip
KINDS = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.int64, torch.bool,
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
)  # fmt: skip
SHAPES = ((), (0,), (1,), (8,), (0, 8), (8, 0), (1, 1), (8, 8), (8, 16), (8, 4, 1, 1), (4, 8, 3), (1, 1, 8, 8))


class Chance:
    """Choices that a seed repeats."""

    def __init__(self, seed):
        self.random = torch.Generator().manual_seed(seed)

    def of(self, some):
        return some[int(torch.randint(len(some), (), generator=self.random))]

    def tensor(self):
        values = torch.randn(self.of(SHAPES), generator=self.random)
        form = self.of(("dense", "sparse", "mask", "nan", "tiny", "zero", "rows"))
        if form == "sparse":
            values = values * (values.abs() > 1)
        elif form == "mask":
            values = (values > 0).float()
        elif form == "nan":
            values = torch.where(values > 1, float("nan"), values)
        elif form == "tiny":
            values = torch.where(values > 0, values * 1e-12, values)
        elif form == "zero":
            values = values * 0
        elif form == "rows" and values.dim():
            values[::2] = values[::2] * 1e-13
        kind = self.of((torch.float32, torch.float32, torch.float32, *KINDS))
        if not (kind.is_floating_point or kind.is_complex):
            values = values.nan_to_num(1.0)
        return (values if kind.is_signed else values.abs()).to(kind)

    def table(self):
        return {name: self.tensor() for name in NAMES if self.of((True, False))}

    def optimizer(self, tensors):
        count = len(tensors) - self.of((0, 0, 1))
        entry = self.of(({"exp_avg": self.tensor(), "step": 3}, {"exp_avg": 3}, 5, None, {}))
        groups = self.of((
            [{"params": list(range(count))}], [{"params": 3}], [{"params": [[1]]}], [{"params": [0], "param_names": 5}],
            [{"params": [0], "param_names": ["fc.weight"]}], [3], 3, [{}], [],
        ))  # fmt: skip
        state = {
            k: {"exp_avg": torch.zeros_like(t)} if self.of((1, 0)) else entry for k, t in enumerate(tensors.values())
        }
        return self.of(({"state": state, "param_groups": groups}, {"state": 3}, {}, None))


@pytest.mark.parametrize("start", range(0, 40, 20))
def test_no_check_falls_over_anything(start):
    """Tables of odd tensors; what is mended is mended for good."""
    for seed in range(start, start + 20):
        chance = Chance(seed)
        tensors = chance.table()
        subject = Subject(
            Path("odd.pt"), chance.of(("torch", "safetensors", "onnx")), tensors,
            {name: t.bool() for name, t in chance.table().items() if t.element_size() > 1 and not t.is_complex()},
            True, averages={"ema": chance.table()}, dense=chance.table(), others={"other": chance.table()},
            optimizer=chance.optimizer(tensors), used=dict.fromkeys(tensors, "MatMul"),
        )  # fmt: skip

        report = report_on(subject, Source())
        after, fixed = mended(subject)

        assert bool(fixed) == bool(report.fixable), seed
        assert set(after.tensors) <= {*tensors, "fc.weight"}
        assert not report_on(after, Source()).fixable, seed


STATISTICS = {
    "none": ({"running_mean": torch.zeros(0), "running_var": torch.zeros(0), "weight": torch.zeros(0)}, 0),
    "number": ({"running_mean": torch.tensor(0.0), "running_var": torch.tensor(0.0)}, 1),
    "lengths": ({"running_mean": torch.zeros(3), "running_var": torch.zeros(4)}, 1),
    "complex": ({"running_mean": torch.zeros(3), "running_var": torch.ones(3, dtype=torch.complex64)}, 1),
}


@pytest.mark.parametrize("which", STATISTICS)
def test_statistics_that_are_none(tmp_path, which):
    """Told where mean and variance cannot belong together; no channels are no fault."""
    about, count = STATISTICS[which]
    state = {f"bn.{name}": tensor for name, tensor in about.items()} | {"fc.weight": torch.randn(4, 4)}

    report = clinic.look(state, tmp_path / "w.pt")

    assert [f.kind for f in report.findings] == ["odd statistics"] * count


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_leftovers_of_small_types(tmp_path, kind):
    weight, mask = torch.randn(8, 8).to(kind), (torch.rand(8, 8) > 0.5)
    torch.save({"a.weight_orig": weight, "a.weight_mask": mask.to(kind)}, tmp_path / "w.pt")

    tensors, _ = clinic.treat(tmp_path / "w.pt")

    assert tensors["a.weight"].dtype == kind
    assert torch.equal(tensors["a.weight"].float(), torch.where(mask, weight.float(), 0.0))


@pytest.mark.parametrize("flag", ["path", "masks", "ema", "dense"])
def test_a_name_that_no_system_takes(tmp_path, flag):
    """The file that cannot be looked for is named, and not another."""
    good, long = clinic.write({"w": torch.randn(4, 4)}, tmp_path / "w.pt"), tmp_path / ("x" * 300)

    with pytest.raises(FileError, match="x{300}"):
        clinic.examine(long if flag == "path" else good, clinic.Beside(**{} if flag == "path" else {flag: long}))


@pytest.mark.parametrize("where", ["network", "average", "other"])
def test_complex_nan_is_found_wherever_it_lies(tmp_path, where):
    bad = torch.zeros(4, 4, dtype=torch.complex64)
    bad[1, 2] = complex(0, float("nan"))
    plain = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}
    tables = {"state_dict": dict(plain), "ema": dict(plain), "critic": dict(plain)}
    tables[{"network": "state_dict", "average": "ema", "other": "critic"}[where]]["b.weight"] = bad
    torch.save(tables, tmp_path / "c.pt")

    report = clinic.examine(tmp_path / "c.pt")

    assert clinic.kinds(report) == [("not finite", ("b.weight",), 1)]
    assert "critic" in report.left and set(report.left) <= {"critic"}
