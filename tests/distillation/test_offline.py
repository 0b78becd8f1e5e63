"""The teacher's values kept: equal to its own, computed once a sample, beside batches that are the plain loader's."""

import os
import pickle
import random
import re
import signal
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
    get_worker_info,
)

from tersor import TorchEvaluator, storage
from tersor.distillation import Distilled, cached_loader, content_of, teacher_cache
from tersor.distillation.samples import KeyedData
from tersor.errors import CheckpointError, ConflictError, InvalidValueError, NumericalError, TersorError, TrainingError
from tersor.testing.processes import in_two_processes, why_not_two

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])


class Numbers(Dataset):
    """Seven samples, `noise` times random numbers of every kind added to each."""

    def __init__(self, noise=0.0, size=7):
        self.values = torch.randn(size, 3, generator=torch.Generator().manual_seed(1))
        self.noise = noise
        self.read = 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        self.read += 1
        drawn = torch.rand(3) + torch.tensor(np.random.rand(3)).float() + random.random()
        return self.values[index] + self.noise * drawn, int(index)


class Stream(IterableDataset):
    def __init__(self):
        self.data = Numbers()

    def __iter__(self):
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self.data[index] for index in range(start, 7, step))


class Teacher:
    """Counts the rows that it is asked for."""

    def __init__(self):
        self.rows = 0

    def __call__(self, batch):
        assert not torch.is_grad_enabled()
        self.rows += len(batch[0])
        return {"logits": batch[0] @ WEIGHT.T, "hidden": batch[0].reshape(-1, 3, 1) * 2}


def nobody(batch):
    raise AssertionError("the teacher was asked")


def check(batches):
    """Each row is what the teacher gives for that sample, computed by hand in float64; the samples."""
    seen = []
    for (inputs, indices), values in batches:
        logits = [[sum(float(w) * float(x) for w, x in zip(row, one, strict=True)) for row in WEIGHT] for one in inputs]
        torch.testing.assert_close(
            values["logits"].double(), torch.tensor(logits, dtype=torch.float64), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(values["hidden"][..., 0], inputs * 2)
        assert values["logits"].dtype == torch.float32
        seen += [(int(index), tuple(one.tolist())) for index, one in zip(indices, inputs, strict=True)]
    return sorted(seen)


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("by", "variants", "noise"), [("index", None, 0.0), ("index", 1, 1.0), ("index", 2, 1.0), ("content", 1, 0.0)]
)
def test_values_are_the_teachers_and_it_is_asked_once(by, variants, noise, workers, files, tmp_path):
    teacher = Teacher()
    loader = DataLoader(
        Numbers(noise),
        batch_size=3,
        shuffle=True,
        num_workers=workers,
        persistent_workers=variants == 2 and workers > 0,
    )
    options = {"by": by, "variants": variants}
    if files:
        options.update(directory=tmp_path / "cache", fingerprint="t")
    batches = cached_loader(loader, teacher, **options)
    passes = [check(batches) for _ in range(4)]
    ways = variants or 1
    assert teacher.rows == len(batches.cache) == batches.cache.misses == 7 * ways
    assert batches.cache.hits == 4 * 7 - 7 * ways
    assert passes[0] == passes[2]
    assert (passes[0] == passes[1]) == (ways == 1)
    assert len(batches) == 3
    if files:
        assert len(list((tmp_path / "cache").iterdir())) == 2 * ways  # one file and its index for each pass with news
        again = cached_loader(loader, nobody, **options)
        assert [check(again) for _ in range(2)] == passes[:2]
        assert again.cache.misses == 0


def loaders():
    data = Numbers()
    by_twos = [[0, 5], [torch.tensor(3), np.int64(1)], [6]]
    weighted = WeightedRandomSampler([0.2] * 7, 10, generator=torch.Generator().manual_seed(3))

    def twice(samples):
        return {"x": torch.stack([x for x, _ in samples]), "names": [str(index) for _, index in samples]}

    yield "shuffled", "index", DataLoader(data, 3, shuffle=True)
    yield "generator", "index", DataLoader(data, 3, shuffle=True, generator=torch.Generator().manual_seed(5))
    yield "dropping", "index", DataLoader(data, 3, shuffle=True, drop_last=True)
    yield "sampler", "index", DataLoader(data, 3, sampler=weighted)
    yield "batch sampler", "index", DataLoader(data, batch_sampler=by_twos)
    yield "collate", "index", DataLoader(data, 3, collate_fn=twice)
    yield "one by one", "index", DataLoader(data, None, shuffle=True)
    yield "lists", "index", DataLoader(list(data), None, sampler=[1, 2])
    yield "bulk", "index", DataLoader(data.values, None, sampler=BatchSampler(RandomSampler(data), 3, False))
    yield "subset", "index", DataLoader(Subset(data, [4, 2, 0]), 2, shuffle=True)
    yield "distributed", "index", DataLoader(data, 2, sampler=DistributedSampler(data, num_replicas=2, rank=1))
    yield "workers", "index", DataLoader(data, 3, shuffle=True, num_workers=2)
    yield "content", "content", DataLoader(data, 3, shuffle=True, collate_fn=twice)
    yield "content one by one", "content", DataLoader(data, None, shuffle=True)
    yield "stream", "content", DataLoader(Stream(), 3, drop_last=True)
    yield "stream of workers", "content", DataLoader(Stream(), 2, num_workers=2)
    yield "stream one by one", "content", DataLoader(Stream(), None)


def rows(batch):
    """Something for each row of any batch."""
    inputs = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (tuple, list)) else batch
    return {"sums": inputs.reshape(len(inputs), -1).sum(1, keepdim=True)}


@pytest.mark.parametrize(("by", "plain"), [pytest.param(by, plain, id=name) for name, by, plain in loaders()])
def test_batches_are_the_plain_loaders_bit_for_bit(by, plain):
    generators = [one for one in (plain.generator, getattr(plain.sampler, "generator", None)) if one is not None]
    starts = [one.get_state() for one in generators]

    def passes(loader):
        torch.manual_seed(3)
        for generator, start in zip(generators, starts, strict=True):
            generator.set_state(start)
        drawn = []
        for epoch in range(2):
            if hasattr(plain.sampler, "set_epoch"):
                plain.sampler.set_epoch(epoch)
            drawn.append(list(loader))
        return drawn, torch.get_rng_state()

    expected, state = passes(plain)
    got, state_after = passes(cached_loader(plain, rows, by=by, variants=None))
    assert torch.equal(state, state_after)
    assert [len(batches) for batches in got] == [len(batches) for batches in expected]
    for one, other in zip(chain(*got), chain(*expected), strict=True):
        assert type(one) is Distilled
        assert content_of(one.batch) == content_of(other)
        assert type(one.batch) is type(other)
        assert torch.equal(one.teacher["sums"], rows(other)["sums"])


def test_random_numbers_are_drawn_when_the_plain_loader_draws_them():
    plain = DataLoader(Numbers(), 3, shuffle=True)

    def drawn(loader):
        torch.manual_seed(0)
        batches = iter(loader)
        between = torch.rand(1).item()
        return between, [(batch.batch if loader is not plain else batch)[1].tolist() for batch in batches]

    assert drawn(cached_loader(plain, Teacher(), variants=None)) == drawn(plain)


def test_two_passes_at_once_have_each_their_variant():
    batches = cached_loader(DataLoader(Numbers(1.0), 3), Teacher(), variants=2)
    first, second = iter(batches), iter(batches)
    together = list(zip(first, second, strict=True))
    assert [check(both) for both in zip(*together, strict=True)] == [check(batches), check(batches)]


def test_a_deterministic_data_set_needs_no_thought_of_variants():
    plain = DataLoader(Numbers(), 3, shuffle=True, generator=torch.Generator().manual_seed(5))
    expected = list(plain)
    plain.generator.manual_seed(5)
    for one, (inputs, indices) in zip(cached_loader(plain, Teacher()), expected, strict=True):
        assert torch.equal(one.batch[0], inputs)
        assert torch.equal(one.batch[1], indices)


def test_variants_are_replayed_the_same_in_any_order_and_any_process():
    def seen(variants, passes, seed=0, **options):
        batches = cached_loader(DataLoader(Numbers(1.0), **options), Teacher(), variants=variants, seed=seed)
        return [check(batches) for _ in range(passes)]

    first = seen(3, 6, batch_size=2, shuffle=True)
    assert first[:3] == first[3:]
    drawn = {
        tuple(round(a - b, 4) for a, b in zip(x, Numbers().values[i].tolist(), strict=True))
        for of in first
        for i, x in of
    }
    assert len(drawn) == 3 * 7  # no two samples, no two variants draw alike
    assert seen(3, 3, batch_size=3, num_workers=2) == first[:3]
    assert seen(2, 2, batch_size=7) == first[:2]
    assert seen(1, 1, batch_size=7) == first[:1]
    assert seen(1, 1, batch_size=7, seed=1) != first[:1]


def test_replaying_leaves_the_random_state_alone():
    torch.manual_seed(2)
    batches = cached_loader(DataLoader(Numbers(1.0), 3, generator=torch.Generator()), Teacher())
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(batches)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_a_run_goes_on_with_the_variant_of_its_pass():
    batches = cached_loader(DataLoader(Numbers(1.0), 3), Teacher(), variants=3)
    passes = [check(batches) for _ in range(3)]
    resumed = cached_loader(DataLoader(Numbers(1.0), 3), Teacher(), variants=3)
    resumed.passes = 2
    assert check(resumed) == passes[2]


def test_a_cold_and_a_warm_cache_train_alike():
    def teacher(batch):
        return {"x": torch.rand(len(batch[0]), 1)}

    batches = cached_loader(DataLoader(Numbers(), 3, shuffle=True), teacher, variants=None)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append([(batch[1].tolist(), torch.rand(1).item()) for batch, _ in batches])
    assert drawn[0] == drawn[1]


def test_only_what_is_missing_is_computed():
    teacher = Teacher()
    batches = cached_loader(DataLoader(Numbers(), batch_sampler=[[0, 1, 0], [1, 2, 3], [0, 3], [4, 4]]), teacher)
    check(batches)
    assert teacher.rows == 2 + 2 + 0 + 1
    assert (batches.cache.misses, batches.cache.hits) == (5, 5)


def test_a_batch_that_cannot_be_cut_is_computed_whole_and_its_known_rows_stay():
    asked = []

    def teacher(batch):
        asked.append(batch["names"])
        return {"x": batch["x"] + len(asked)}

    def collate(samples):
        return {"x": torch.stack([x for x, _ in samples]), "names": [str(index) for _, index in samples]}

    data = Numbers()
    batches = cached_loader(DataLoader(data, batch_sampler=[[0, 1], [1, 2]], collate_fn=collate), teacher)
    (_, first), (_, second) = batches
    assert asked == [["0", "1"], ["1", "2"]]
    assert torch.equal(first["x"], data.values[:2] + 1)
    assert torch.equal(second["x"], data.values[1:3] + torch.tensor([[1.0], [2.0]]))


def test_values_can_be_written_to():
    teacher = Teacher()
    batches = cached_loader(DataLoader(Numbers(), 7), teacher)
    for _ in range(2):
        ((_, values),) = batches
        values["logits"].zero_()
    check(batches)


def test_what_a_teacher_writes_over_later_is_kept():
    buffer = torch.empty(3, 3)

    def teacher(batch):
        return {"x": buffer[: len(batch[0])].copy_(batch[0])}

    batches = cached_loader(DataLoader(Numbers(), 3), teacher)
    list(batches)
    assert all(torch.equal(values["x"], inputs) for (inputs, _), values in batches)


@pytest.mark.parametrize("variants", [None, 1])
def test_a_sample_that_is_another_one_is_an_error(variants, tmp_path):
    class Own(Numbers):
        def __getitem__(self, index):
            return self.values[index] + self.generator.normal(), index

    data = Own()
    data.generator = np.random.default_rng(0)  # nobody can replay this
    with pytest.raises(TrainingError, match=r"sample 0(:0)? is another one"):
        list(cached_loader(DataLoader(data, batch_sampler=[[0], [0]]), Teacher(), variants=variants))
    with pytest.raises(TrainingError, match=r"sample 1(:0)? is another one"):
        list(cached_loader(DataLoader(data, batch_sampler=[[1, 1]]), Teacher(), variants=variants))
    if variants is None:
        with pytest.raises(TrainingError, match=r"sample 0 is another one.*replay it \(variants=1\)"):
            list(cached_loader(DataLoader(Numbers(1.0), batch_sampler=[[0], [0]]), Teacher(), variants=None))
    options = {"variants": variants, "directory": tmp_path, "fingerprint": "t"}
    list(cached_loader(DataLoader(Numbers()), Teacher(), **options))
    other = Numbers()
    other.values = other.values.flip(0)
    with pytest.raises(TrainingError, match=re.escape(str(tmp_path))):
        list(cached_loader(DataLoader(other), Teacher(), **options))


def test_content_tells_samples_in_another_order_and_in_a_subset(tmp_path):
    options = {"by": "content", "directory": tmp_path, "fingerprint": "t"}
    data = Numbers()
    list(cached_loader(DataLoader(data.values[[5, 2, 0]], 2), rows, **options))
    later = cached_loader(DataLoader(data.values, 7), rows, **options)
    ((batch, values),) = later
    assert torch.equal(values["sums"], batch.sum(1, keepdim=True))
    assert (later.cache.misses, later.cache.hits) == (4, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "other"}, "fingerprint='t', and not with 'other'"),
        ({"by": "content"}, "by='index', and not with 'content'"),
        ({"seed": 1}, "seed=0, and not with 1"),
        ({"variants": None}, "seed=0, and not with None"),
        ({"dtype": torch.float16}, "dtype=None, and not with 'float16'"),
    ],
)
def test_what_something_else_made_is_refused(change, said, tmp_path):
    options = {"directory": tmp_path, "fingerprint": "t"}
    list(cached_loader(DataLoader(Numbers()), Teacher(), **options))
    (index,) = tmp_path.glob("*.json")
    with pytest.raises(CheckpointError, match=re.escape(f"{index}: was made with {said}")):
        cached_loader(DataLoader(Numbers()), Teacher(), **{**options, **change})
    assert len(cached_loader(DataLoader(Numbers()), Teacher(), **options, variants=2).cache) == 7  # half of them


def test_other_names_and_shapes_are_refused(tmp_path):
    def padded(batch):
        return {"tokens": torch.zeros(len(batch[0]), int(batch[1].max()))}

    with pytest.raises(TrainingError, match=r"tokens float32 \(6,\).*earlier.*tokens float32 \(3,\).*pad all batches"):
        list(cached_loader(DataLoader(Numbers(), 4), padded))
    options = {"directory": tmp_path, "fingerprint": "t"}
    list(cached_loader(DataLoader(Numbers(), sampler=[0, 1]), Teacher(), **options))
    with pytest.raises(TrainingError, match=r"gives sums float32 \(1,\), and.* gave hidden float32 \(3, 1\), logits"):
        list(cached_loader(DataLoader(Numbers()), rows, **options))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda batch: batch[0], "gave a Tensor"),
        (lambda batch: {}, "gave a dict, or nothing"),
        (lambda batch: {"loss": batch[0].sum()}, r"shape \(\) as 'loss'"),
        (lambda batch: {"x": [1, 2]}, "gave list as 'x'"),
        (lambda batch: {"x": batch[0][:1]}, "gave 1 rows as 'x' for 3 samples"),
    ],
)
def test_what_compute_may_not_give(given, said):
    with pytest.raises(TrainingError, match=said):
        list(cached_loader(DataLoader(Numbers(), 3), given))


def filled(directory, **options):
    batches = cached_loader(DataLoader(Numbers(), 3), Teacher(), directory=directory, fingerprint="t", **options)
    list(batches)
    (values,) = directory.glob("*.safetensors")
    return values


@pytest.mark.parametrize("damage", ["flipped", "short", "other", "index", "not json", "no checksum"])
def test_a_damaged_file_is_an_error_that_names_it_and_deleting_it_is_enough(damage, tmp_path):
    values = filled(tmp_path)
    index = values.with_suffix(".json")
    content = bytearray(values.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        values.write_bytes(content)
    elif damage == "short":
        values.write_bytes(content[:-10])
    elif damage == "other":
        storage.write_tensors(values, {"x": torch.zeros(7)})
    elif damage == "index":
        index.write_text(index.read_text().replace('"rows": [1, ', '"rows": ['))
    elif damage == "not json":
        index.write_text(index.read_text()[:-5])
    else:
        index.write_text(index.read_text().replace("sha256", "md5"))
    named = index if damage in ("index", "not json", "no checksum") else values

    def run():
        batches = cached_loader(DataLoader(Numbers(), 3), Teacher(), directory=tmp_path, fingerprint="t")
        check(batches)
        return batches.cache.misses

    with pytest.raises(CheckpointError, match=rf"{re.escape(str(named))}: is damaged.*Delete it"):
        run()
    named.unlink()
    assert (run(), run()) == (7, 0)


def test_a_kill_in_the_middle_of_writing_leaves_no_file_that_counts(tmp_path, monkeypatch):
    """A child is killed when half of the second file is written."""
    monkeypatch.setattr(teacher_cache, "BYTES_A_FILE", 1)
    save, written = storage.save_file, []

    def half(tensors, path, metadata=None):
        save(tensors, path, metadata=metadata)
        written.append(path)
        if len(written) == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:50])
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            monkeypatch.setattr(storage, "save_file", half)
            filled(tmp_path)
        finally:  # never on into the other tests
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    names = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(names) == 2  # the first file and its index
    batches = cached_loader(DataLoader(Numbers(), 3), Teacher(), directory=tmp_path, fingerprint="t")
    assert len(batches.cache) == 3
    check(batches)
    assert batches.cache.misses == 4


def test_values_without_their_index_do_not_count(tmp_path):
    filled(tmp_path).with_suffix(".json").unlink()
    assert len(cached_loader(DataLoader(Numbers()), Teacher(), directory=tmp_path, fingerprint="t").cache) == 0


def test_leaving_in_the_middle_of_a_pass_keeps_what_was_computed(tmp_path):
    options = {"directory": tmp_path, "fingerprint": "t"}
    for _ in cached_loader(DataLoader(Numbers(), 3), Teacher(), **options):
        break
    assert len(cached_loader(DataLoader(Numbers(), 3), nobody, **options).cache) == 3

    def failing(batch):
        if 6 in batch[1]:
            raise RuntimeError("the teacher fell")
        return Teacher()(batch)

    with pytest.raises(RuntimeError, match="the teacher fell"):
        list(cached_loader(DataLoader(Numbers(), 3), failing, **options))
    assert len(cached_loader(DataLoader(Numbers(), 3), nobody, **options).cache) == 6


def test_many_samples_a_file_and_files_of_any_number(tmp_path, monkeypatch):
    data = Numbers(size=50)
    options = {"directory": tmp_path / "one", "fingerprint": "t"}
    check(cached_loader(DataLoader(data, 4), Teacher(), **options))
    assert len(list(tmp_path.glob("one/*.safetensors"))) == 1
    monkeypatch.setattr(teacher_cache, "BYTES_A_FILE", 10 * 5 * 4)  # five numbers a sample
    options["directory"] = tmp_path / "many"
    batches = cached_loader(DataLoader(data, 4, shuffle=True), Teacher(), **options)
    assert check(batches) == check(batches)
    assert len(list(tmp_path.glob("many/*.safetensors"))) == 5  # of twelve samples, and two
    monkeypatch.setattr(teacher_cache, "SECONDS_A_FILE", 0.0)
    options["directory"] = tmp_path / "late"
    check(cached_loader(DataLoader(data, 25), Teacher(), **options))
    assert len(list(tmp_path.glob("late/*.safetensors"))) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("files", [False, True])
def test_half_precision(dtype, files, tmp_path):
    def teacher(batch):
        return {"x": batch[0], "top": batch[1]}

    options = {"directory": tmp_path, "fingerprint": "t"} if files else {}
    batches = cached_loader(DataLoader(Numbers(), 3), teacher, dtype=dtype, **options)
    for _ in range(2):
        for (inputs, indices), values in batches:
            assert values["x"].dtype == torch.float32
            assert torch.equal(values["x"], inputs.to(dtype).float())
            assert torch.equal(values["top"], indices)
            assert values["top"].dtype == torch.int64
    if files:
        (path,) = tmp_path.glob("*.safetensors")
        assert storage.read_tensors(path)[0]["x"].dtype == dtype


def test_a_number_beyond_half_precision_is_an_error():
    def teacher(batch):
        return {"x": torch.tensor([[1e5, -float("inf")]])}

    with pytest.raises(NumericalError, match="'x' holds 100000, which is beyond float16"):
        list(cached_loader(DataLoader(Numbers()), teacher, dtype=torch.float16))
    ((_, values), *_) = cached_loader(DataLoader(Numbers()), teacher, dtype=torch.bfloat16)
    assert values["x"].tolist() == [[torch.tensor(1e5).bfloat16().item(), -float("inf")]]


@pytest.mark.parametrize("workers", [0, 2])
def test_filling_ahead_changes_nothing_but_who_computes(workers, tmp_path):
    def loader():
        generator = torch.Generator().manual_seed(4)
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        return DataLoader(Numbers(1.0), 3, shuffle=True, drop_last=True, generator=generator, **options)

    plain = cached_loader(loader(), Teacher(), variants=2)
    expected = [check(plain) for _ in range(3)]
    teacher = Teacher()
    batches = cached_loader(loader(), teacher, variants=2, directory=tmp_path, fingerprint="t")
    state = torch.get_rng_state()
    batches.fill()
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.rows == len(batches.cache) == 14  # what drop_last would drop as well
    assert [check(batches) for _ in range(3)] == expected
    assert teacher.rows == 14
    assert len(batches) == 2
    again = cached_loader(loader(), nobody, variants=2, directory=tmp_path, fingerprint="t")
    again.fill()
    assert again.dataset.read == 0  # nothing is even read
    assert again.cache.misses == 0


def test_filling_from_a_stream():
    batches = cached_loader(DataLoader(Stream(), 3, drop_last=True), Teacher(), by="content")
    batches.fill()
    assert len(batches.cache) == 7
    assert len(check(batches)) == 6
    assert batches.cache.misses == 7


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_share_a_directory(tmp_path):
    def work(rank):
        data = Numbers()
        sampler = DistributedSampler(data, shuffle=False)
        teacher = Teacher()
        options = {"directory": tmp_path, "fingerprint": "t"}
        batches = cached_loader(DataLoader(data, 2, sampler=sampler), teacher, **options)
        check(batches)
        torch.distributed.barrier()
        everything = cached_loader(DataLoader(data, 2), nobody, **options)
        check(everything)
        batches.sampler.dataset = data
        check(batches)  # has the other's files now too
        return {"rows": torch.tensor(teacher.rows), "known": torch.tensor(len(batches.cache))}

    first, second = in_two_processes(work)
    assert first == second == {"rows": torch.tensor(4), "known": torch.tensor(7)}
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_training_on_the_batches_is_training_on_the_loader():
    def trained(cached):
        torch.manual_seed(0)
        model = nn.Linear(3, 7)
        plain = DataLoader(Numbers(), 3, shuffle=True)
        loader = cached_loader(plain, Teacher(), variants=None) if cached else plain
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        evaluator = TorchEvaluator.from_loader(loader, nn.functional.cross_entropy, optimizer, eval_loader=loader)
        evaluator.train(model, max_epochs=2)
        return model.weight, evaluator.evaluate(model)

    (weight, accuracy), (expected, expected_accuracy) = trained(True), trained(False)
    assert torch.equal(weight, expected)
    assert accuracy == expected_accuracy


def open_file(worker):
    """As data sets that hold a file are opened, in each worker."""
    get_worker_info().dataset.file = get_worker_info().dataset.path + str(worker)


class FromFile(Dataset):
    path = "file"

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return float(self.file == "file0"), index


def test_workers_see_the_data_set_itself():
    loader = DataLoader(FromFile(), 2, num_workers=1, worker_init_fn=open_file)
    (batch, _), *_ = cached_loader(loader, lambda batch: {"x": batch[0]})
    assert batch[0].tolist() == [1.0, 1.0]
    restored = pickle.loads(pickle.dumps(KeyedData(Numbers())))  # noqa: S301
    assert len(restored) == 7
    assert torch.equal(restored.values, Numbers().values)


def test_a_subclass_of_a_loader_keeps_its_ways():
    class Half(DataLoader):
        def __init__(self, data):
            super().__init__(data, 2, sampler=SequentialSampler(data))

        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number % 2:
                    yield batch

    assert [values["logits"].shape[0] for _, values in cached_loader(Half(Numbers()), Teacher())] == [2, 1]

    class Moved(DataLoader):
        def __iter__(self):
            return (list(batch) for batch in super().__iter__())

    with pytest.raises(TrainingError, match="the Moved: its batches are not what its collate function gives"):
        list(cached_loader(Moved(Numbers()), Teacher()))


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"loader": [1, 2]}, InvalidValueError, "loader: a list.*DataLoader"),
        ({"by": "name"}, InvalidValueError, "'name' is unknown.*'index', 'content'"),
        ({"variants": 0}, InvalidValueError, "variants: 0"),
        ({"variants": True}, InvalidValueError, "variants: True"),
        ({"variants": 2, "by": "content"}, ConflictError, "2 with by='content'"),
        ({"dtype": torch.int8}, InvalidValueError, "dtype: torch.int8"),
        ({"directory": "somewhere"}, ConflictError, "fingerprint: is not given"),
        ({"loader": DataLoader(Stream())}, InvalidValueError, "a Stream have no index.*Use by='content'"),
    ],
)
def test_what_is_refused(options, kind, said):
    loader = options.pop("loader", DataLoader(Numbers()))
    with pytest.raises(kind, match=said):
        cached_loader(loader, Teacher(), **options)


def test_indices_that_tell_no_sample_are_refused():
    class Odd(Numbers):
        def __getitem__(self, index):
            return torch.ones(3), len(str(index))

    with pytest.raises(InvalidValueError, match="the sampler gives a float as an index"):
        list(cached_loader(DataLoader(Odd(), sampler=[0.5]), Teacher()))
    named = cached_loader(DataLoader(Odd(), sampler=["a", "1", 1, ("a", 1), ("a", 2), "a"]), Teacher())
    list(named)
    assert named.cache.misses == 5
    with pytest.raises(InvalidValueError, match=r"gives lists of indices.*Legal: None"):
        list(cached_loader(DataLoader(Numbers(), None, sampler=[[0, 1]]), Teacher()))


def test_errors_in_workers_stay_typed():
    class Named(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return object()

    loader = DataLoader(Named(), num_workers=1, collate_fn=lambda samples: torch.zeros(len(samples), 1))
    with pytest.raises(TersorError, match="object cannot be told from another"):
        list(cached_loader(loader, rows, by="content"))
    assert len(list(cached_loader(loader, rows))) == 1  # by index it need not be told


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text(encoding="utf-8")
    section = page[page.index("## Offline") :].split("\n## ")[0]
    loader = DataLoader([(torch.ones(3) * number, number % 2) for number in range(7)], 3, shuffle=True)
    scope = {"loader": loader, "teacher": nn.Linear(3, 2), "student": nn.Linear(3, 2)}
    scope["optimizer"] = torch.optim.SGD(scope["student"].parameters(), lr=0.1)
    codes = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert codes
    for code in codes:
        exec(code, scope)
    batches = scope["batches"]
    assert len(batches.cache) == batches.cache.misses == 7
