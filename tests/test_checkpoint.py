"""Checkpoints of models whose sizes have changed."""

import copy
import hashlib
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from tersor.checkpoint import ARCHITECTURE_FILE, TENSORS_FILE, load, read_architecture, save
from tersor.errors import CheckpointError
from tersor.wrapping import ModelWrappers


class Net(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3)
        self.bn = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, groups=channels)
        self.fc = nn.Linear(channels, 10)
        self.register_buffer("scale", torch.ones(channels, 1, 1), persistent=False)

    def forward(self, x):
        x = self.conv2(self.bn(self.conv1(x))) * self.scale
        return self.fc(x.mean((2, 3)))


def sliced_net():
    """A Net with 3 of its 8 channels, cut by hand."""
    torch.manual_seed(0)
    net, keep = Net().eval(), torch.tensor([0, 3, 6])
    for owner, name in [
        (net.conv1, "weight"),
        (net.conv1, "bias"),
        (net.bn, "weight"),
        (net.bn, "bias"),
        (net.bn, "running_mean"),
        (net.bn, "running_var"),
        (net.conv2, "weight"),
        (net.conv2, "bias"),
        (net, "scale"),
    ]:
        tensor = getattr(owner, name)
        tensor.data = torch.randn(3, *tensor.shape[1:]).abs()
    net.fc.weight.data = net.fc.weight.data[:, keep]
    net.conv1.out_channels = net.bn.num_features = net.fc.in_features = 3
    net.conv2.in_channels = net.conv2.out_channels = net.conv2.groups = 3
    return net


def test_small_model_comes_back_equal(tmp_path):
    small = sliced_net()
    loaded = load(Net, save(small, tmp_path / "small", metadata={"accuracy": 0.5})).eval()
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(loaded(x), small(x))
    assert str(loaded) == str(small)
    assert loaded.scale.shape == (3, 1, 1)
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [ARCHITECTURE_FILE, TENSORS_FILE]
    architecture = read_architecture(tmp_path / "small")
    assert architecture.metadata == {"accuracy": 0.5}
    assert architecture.sizes["conv2"] == {"in_channels": 3, "out_channels": 3, "groups": 3}
    assert architecture.tensors["bn.num_batches_tracked"].shape == ()


def test_instance_is_changed_in_place_and_keeps_its_parameters(tmp_path):
    net = Net()
    net(torch.randn(2, 1, 8, 8)).sum().backward()
    before = dict(net.named_parameters())
    assert load(net, save(sliced_net(), tmp_path / "small")) is net
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert net.conv1.weight.shape == (3, 1, 3, 3)
    assert net.conv1.weight.grad is None
    net(torch.randn(2, 1, 8, 8)).sum().backward()
    assert net.conv1.weight.grad.shape == (3, 1, 3, 3)


def test_dtype_and_requires_grad_are_those_saved(tmp_path):
    net = Net().half()
    net.fc.weight.requires_grad_(False)
    loaded = load(Net, save(net, tmp_path / "half"))
    assert loaded.conv1.weight.dtype == torch.float16
    assert loaded.bn.num_batches_tracked.dtype == torch.int64
    assert not loaded.fc.weight.requires_grad
    assert loaded.fc.bias.requires_grad


def test_model_without_memory_is_filled(tmp_path):
    def build():
        with torch.device("meta"):
            return Net()

    small = sliced_net()
    loaded = load(build, save(small, tmp_path / "small")).eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), small(x))
    assert isinstance(loaded.fc.weight, nn.Parameter)


class Tied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("built_tied", [True, False])
@pytest.mark.parametrize("saved_tied", [True, False])
def test_ties_are_those_saved(tmp_path, saved_tied, built_tied):
    saved = Tied(saved_tied)
    loaded = load(lambda: Tied(built_tied), save(saved, tmp_path / "tied"))
    assert (loaded.head.weight is loaded.embed.weight) == saved_tied
    assert torch.equal(loaded.head.weight, saved.head.weight)
    assert torch.equal(loaded.embed.weight, saved.embed.weight)
    assert len(list(loaded.parameters())) == (1 if saved_tied else 2)


def test_saving_changes_nothing_and_replaces_the_older(tmp_path):
    net = Net()
    before = copy.deepcopy(net.state_dict())
    save(net, tmp_path / "a")
    save(sliced_net(), tmp_path / "a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert read_architecture(tmp_path / "a").tensors["conv1.weight"].shape == (3, 1, 3, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"thesis\.tex.*folder of the checkpoint's own"):
        save(Net(), tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        save(Net(), tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_wrapped_model_is_refused(tmp_path):
    net = Net()
    wrappers = ModelWrappers(net)
    wrappers["conv1"].stack("weight")
    with pytest.raises(CheckpointError, match=r"Net: the model is wrapped.*unwrap_model\(\)"):
        save(net, tmp_path / "a")
    saved = save(Net(), tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"unwrap_model\(\)"):
        load(net, saved)
    wrappers.detach()


def test_parametrizations_of_the_users_own_are_saved(tmp_path):
    saved, loaded = (weight_norm(nn.Linear(3, 2)) for _ in range(2))
    load(loaded, save(saved, tmp_path / "a"))
    for module in (saved, loaded):
        parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(loaded.weight, saved.weight)


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(CheckpointError, match="metadata must be what JSON can hold"):
        save(Net(), tmp_path / "a", metadata={"loss": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def truncate(folder):
    path = folder / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_byte(folder):
    content = bytearray((folder / TENSORS_FILE).read_bytes())
    content[-10] ^= 1
    (folder / TENSORS_FILE).write_bytes(bytes(content))


def pickled(folder):
    torch.save(Net().state_dict(), folder / TENSORS_FILE)


def other_tensors(folder):
    save(Net(channels=4), folder.parent / "other")
    (folder.parent / "other" / TENSORS_FILE).replace(folder / TENSORS_FILE)


def without_tensors(folder):
    (folder / TENSORS_FILE).unlink()


def without_architecture(folder):
    (folder / ARCHITECTURE_FILE).unlink()


def half_json(folder):
    path = folder / ARCHITECTURE_FILE
    path.write_text(path.read_text()[:200])


def binary_json(folder):
    (folder / ARCHITECTURE_FILE).write_bytes(b"\xff\xfe\x80")


def foreign_json(folder):
    (folder / ARCHITECTURE_FILE).write_text('{"architectures": ["BertModel"]}')


def flip_a_digit(folder):
    path = folder / ARCHITECTURE_FILE
    path.write_text(path.read_text().replace('"groups": 3', '"groups": 2'))


def edit(**changes):
    """Forge the architecture, its checksum included."""

    def damage(folder):
        path = folder / ARCHITECTURE_FILE
        content = json.loads(path.read_text()) | changes
        del content["checksum"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(content | {"checksum": digest}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model\.safetensors: is damaged"),
        (flip_a_byte, r"model\.safetensors: does not belong.*checksum"),
        (pickled, r"model\.safetensors: is damaged or no safetensors file.*Pickled files"),
        (other_tensors, "does not belong"),
        (without_tensors, r"model\.safetensors: there is no such file"),
        (without_architecture, r"is no checkpoint.*Give the folder that tersor\.save wrote"),
        (half_json, r"architecture\.json: is damaged.*save it again"),
        (binary_json, r"architecture\.json: is damaged"),
        (foreign_json, r"architecture\.json: was not written by Tersor"),
        (edit(version=2, tersor="9.0"), r"format version 2, written by Tersor 9\.0\. Legal: 1\. Update Tersor"),
        (flip_a_digit, r"architecture\.json: is damaged \(the checksum differs\)"),
        (edit(tensors={"conv1.weight": {}}), r"(?s)architecture\.json: is damaged.*conv1\.weight"),
        (edit(sizes={"conv1": {"forward": 1}}), "of another kind are 'conv1'"),
        (edit(sizes={"conv9": {"groups": 1}}), "of another kind are 'conv9'"),
    ],
)
def test_damaged_checkpoint_is_refused_and_the_model_left_alone(tmp_path, damage, message):
    folder = save(sliced_net(), tmp_path / "small")
    damage(folder)
    net = Net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load(net, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert str(net) == str(Net())


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: is no checkpoint"):
        load(Net, tmp_path / "nowhere")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.pt: is no checkpoint"):
        load(Net, tmp_path / "model.pt")


def renamed():
    net = Net()
    net.convolution1, net.conv1 = net.conv1, None
    return net


def of_other_rank():
    net = Net()
    net.conv1 = nn.Conv1d(1, 8, 3)
    return net


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (renamed, r"does not have 'convolution1\.weight'.*Did you mean 'convolution1\.weight'\?.*Net, at its original"),
        (of_other_rank, r"of another kind are 'conv1\.weight'"),
        (
            lambda: nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]),
            r"'0\.weight', '0\.bias', '1\.weight' and 5 more",
        ),
    ],
)
def test_wrong_model_is_named_and_left_alone(tmp_path, build, message):
    folder = save(sliced_net(), tmp_path / "small")
    net = build()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load(net, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_function_must_return_a_module(tmp_path):
    with pytest.raises(CheckpointError, match="returned dict"):
        load(dict, save(Net(), tmp_path / "a"))


def test_traced_graph_is_refused_with_a_remedy(tmp_path):
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"traced graph.*x\.flatten\(1\)"):
        save(graph, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()
