"""Descriptions -> models: structure, sizes and errors."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from models.activations import make_activation

FILES = Path(models.__file__).parent

# Published parameter counts for 80 classes: as trained, and for the P6 family with batch norms folded into biases.
UNFUSED = {
    "yolov5n": 1872157,
    "yolov5s": 7235389,
    "yolov5m": 21190557,
    "yolov5l": 46563709,
    "yolov5x": 86749405,
    "yolov5s-v5": 7276605,
    "yolov5s-csp": 7468157,
}
FUSED = {"yolov5n6": 3239884, "yolov5m6": 35704908, "yolov5l6": 76726332, "yolov5x6": 140730220}
ROUNDED_MILLIONS = {"yolov5s6": 12.6, "yolov5s-ghost": 3.9}


def test_every_file_has_a_known_size():
    known = {*UNFUSED, *FUSED, *ROUNDED_MILLIONS}
    assert {path.stem for path in FILES.glob("*.yaml")} == known


@pytest.mark.parametrize("name", [*UNFUSED, *FUSED, *ROUNDED_MILLIONS])
def test_file_builds_at_the_published_size_and_runs(name, monkeypatch):
    """The small ones run; of the large ones, which take seconds to fill and run, only the shapes do."""
    small = name.startswith(("yolov5n", "yolov5s"))
    if not small:
        monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, **_: tensor)
    model = models.build_model(models.load_description(FILES / f"{name}.yaml"))
    params = sum(p.numel() for p in model.parameters())
    if name in UNFUSED:
        assert params == UNFUSED[name]
    elif name in FUSED:
        assert params - sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)) == FUSED[name]
    else:
        assert round(params / 1e6, 1) == ROUNDED_MILLIONS[name]

    strides = (8, 16, 32, 64) if name.endswith("6") else (8, 16, 32)
    assert model.stride_px == strides
    side = strides[-1]
    shapes = [(2, 3, side // s, side // s, 85) for s in strides]
    device = "cpu" if small else "meta"
    model.to(device)
    images = torch.rand(2, 3, side, side, device=device)
    with torch.no_grad():
        assert [tuple(level.shape) for level in model(images)] == shapes
        decoded, raw = model.eval()(images)
    assert [tuple(level.shape) for level in raw] == shapes
    assert decoded.shape == (2, sum(math.prod(shape[1:4]) for shape in shapes), 85)
    if small:
        assert decoded.isfinite().all()


def test_layer_names_and_description(tiny):
    model = models.build_model(tiny, num_classes=7)
    names = set(model.state_dict())
    assert {"model.0.conv.weight", "model.2.m.1.cv2.bn.running_var", "model.6.m.1.bias", "model.6.anchors"} <= names
    assert model.num_classes == model.description["nc"] == 7
    assert tiny["nc"] == 2
    assert model.stride_px == (2, 4)
    assert model.anchors_px.tolist() == [[[4, 5], [6, 6]], [[12, 10], [20, 24]]]
    assert model.detect.anchors[1].tolist() == [[3, 2.5], [5, 6]]
    assert models.build_model(model.description).num_classes == 7


def test_every_conv_has_its_own_activation():
    for name in ("yolov5s-csp", "yolov5s-ghost"):
        model = models.build_model(models.load_description(FILES / f"{name}.yaml"))
        acts = [module.act for module in model.modules() if hasattr(module, "act")]
        assert len({id(act) for act in acts}) == len(acts) > 50


def test_activation_of_the_description(tiny):
    tiny["activation"] = "nn.LeakyReLU(0.1)"
    tiny["csp_activation"] = "relu"
    tiny["backbone"][2][2] = "BottleneckCSP"
    model = models.build_model(tiny)
    assert model.model[0].act.negative_slope == 0.1
    assert model.model[2].m[0].cv1.act.negative_slope == 0.1
    assert isinstance(model.model[2].act, nn.ReLU)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("silu", nn.SiLU),
        ("nn.Hardswish()", nn.Hardswish),
        ("nn.ReLU(inplace=True)", nn.ReLU),
        ("leaky_relu", nn.LeakyReLU),
    ],
)
def test_activation_names(name, kind):
    assert type(make_activation(name)) is kind


@pytest.mark.parametrize(
    "name", ["nn.SiLU(); print(1)", "__import__('os')", "nn.Softmax()", "relu(x)", "relu(1, 2, 3)", ""]
)
def test_activation_outside_the_table(name):
    with pytest.raises(models.ModelError, match="activation"):
        make_activation(name)


def test_depth_and_width_multiples(tiny):
    tiny.update(depth_multiple=2.0, width_multiple=1.2, channel_multiple=4)
    model = models.build_model(tiny)
    assert len(model.model[2].m) == 4
    assert len(model.model[5].m) == 1, "a single block is not repeated"
    assert model.model[0].conv.out_channels == 12, "9.6 rounded up to a multiple of 4"


def test_repeated_block_that_widens(tiny):
    tiny["backbone"][2] = [-1, 3, "Bottleneck", [16]]
    model = models.build_model(tiny)
    assert [block.cv1.conv.in_channels for block in model.model[2]] == [8, 16, 16]


def test_head_starts_from_the_prior(tiny):
    torch.manual_seed(0)
    detect = models.build_model(tiny).detect
    for conv, stride in zip(detect.m, detect.stride_px, strict=True):
        bias = conv.bias.detach().view(2, 7)
        bound = 1 / math.sqrt(conv.in_channels)
        assert (bias[:, :4].abs() <= bound).all()
        assert ((bias[:, 4] - math.log(8 / (640 / stride) ** 2)).abs() <= bound).all()
        assert ((bias[:, 5:] - math.log(0.6 / (2 - 0.99999))).abs() <= bound).all()


def test_anchors_in_reverse_order_are_turned_round(tiny, caplog):
    tiny["anchors"] = tiny["anchors"][::-1]
    model = models.build_model(tiny)
    assert model.anchors_px.tolist() == [[[4, 5], [6, 6]], [[12, 10], [20, 24]]]
    assert "order" in caplog.text


def test_anchors_as_a_count(tiny):
    tiny["anchors"] = 3
    assert models.build_model(tiny).anchors_px.shape == (2, 3, 2)


def test_blocks_narrow_in_place(tiny):
    """Widths are whatever the tensors have: cut 3 of the 8 channels between two layers by hand."""
    model = models.build_model(tiny).eval()
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        bn = model.model[1].bn
        bn.weight[5:], bn.bias[5:] = 0, 0
        expected = model(images)[0]
        narrow = copy.deepcopy(model)
        conv, bn = narrow.model[1].conv, narrow.model[1].bn
        conv.weight = nn.Parameter(conv.weight[:5])
        bn.weight, bn.bias = nn.Parameter(bn.weight[:5]), nn.Parameter(bn.bias[:5])
        bn.running_mean, bn.running_var = bn.running_mean[:5], bn.running_var[:5]
        for consumer in (narrow.model[2].cv1.conv, narrow.model[2].cv2.conv):
            consumer.weight = nn.Parameter(consumer.weight[:, :5])
        found = narrow(images)[0]
    torch.testing.assert_close(found, expected)


def test_decoded_output_stays_float32_in_low_precision(tiny):
    model = models.build_model(tiny).eval()
    with torch.no_grad():
        decoded, raw = model.bfloat16()(torch.rand(1, 3, 16, 16).bfloat16())
    assert raw[0].dtype == torch.bfloat16
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, model.detect.decode([level.float() for level in raw]))


def test_unknown_block_is_named_with_its_place(tiny):
    tiny["backbone"][1][2] = "C2f"
    with pytest.raises(models.ModelError, match=r"layer 1: block 'C2f' is not known; known are Conv, .*C3.*Detect"):
        models.build_model(tiny)


def broken(**changes):
    def change(description):
        description.update(changes)

    return change


def line(index, value):
    def change(description):
        part, i = ("backbone", index) if index < 3 else ("head", index - 3)
        description[part][i] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("anchors"), "key 'anchors' is missing"),
        (lambda d: d.pop("nc"), "key 'nc' is missing"),
        (broken(nc=0), "nc is 0"),
        (broken(nc="many"), "nc is 'many'"),
        (broken(width_multiple=-1), "width_multiple is -1"),
        (broken(depth_multiple="1"), "depth_multiple is '1'"),
        (broken(head=None), "head is nothing"),
        (broken(anchors=[[1, 2, 3]] * 2), r"anchors has the level \[1, 2, 3\]"),
        (broken(anchors=[[1, 2]]), "1 levels of anchors for 2 inputs"),
        (broken(activation="nn.Softmax()"), "activation 'nn.Softmax\\(\\)' is not known"),
        (broken(activation=3), "activation is 3"),
        (line(1, [-1, 1, "Conv"]), r"layer 1: found .* expected \[from, repeats, block"),
        (line(1, [-1, 1, 5, []]), "layer 1: block is 5"),
        (line(1, [-1, 0, "Conv", [8]]), r"layer 1 \(Conv\): repeats is 0"),
        (line(1, [-1, 1, "Conv", 8]), r"layer 1 \(Conv\): arguments are 8"),
        (line(1, [7, 1, "Conv", [8]]), r"layer 1 \(Conv\): from is 7"),
        (line(1, ["a", 1, "Conv", [8]]), r"layer 1 \(Conv\): from is 'a'"),
        (line(1, [-1, 1, "Conv", ["wide"]]), r"layer 1 \(Conv\): .*the width is 'wide'"),
        (line(1, [-1, 1, "Conv", []]), r"layer 1 \(Conv\): arguments \[\] do not fit"),
        (line(1, [-1, 1, "Conv", [8, 3, 2, None, 1, 1, True, 9]]), r"layer 1 \(Conv\): .*do not fit"),
        (line(1, [[-1, 0], 1, "Conv", [8]]), r"layer 1 \(Conv\): takes one index"),
        (line(4, [-1, 1, "Concat", [1]]), r"layer 4 \(Concat\): takes a list"),
        (line(4, [[-1, 2], 1, "Concat", [1]]), r"layer 4 \(Concat\): does not fit inputs"),
        (line(6, [-1, 1, "Conv", [8]]), "last layer of head must be Detect"),
    ],
)
def test_broken_descriptions(tiny, change, message):
    change(tiny)
    with pytest.raises(models.ModelError, match=message) as caught:
        models.build_model(tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("description", [None, [], "yolov5n.yaml"])
def test_description_that_is_no_mapping(description):
    with pytest.raises(models.ModelError, match="expected a mapping"):
        models.build_model(description)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nc: [1", "line 1"),
        (b"- 1\n- 2\n", "holds a list"),
        (b"", "holds nothing"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"nc: 3\n", "key 'anchors' is missing"),
    ],
)
def test_damaged_description_file(tmp_path, content, message):
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(models.ModelError, match=message) as caught:
        models.load_description(path)
    assert str(path) in str(caught.value)


def test_missing_description_file(tmp_path):
    with pytest.raises(models.ModelError, match="cannot be read"):
        models.load_description(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["yolov5n", "yolov5s-csp", "yolov5s-ghost"])
def test_reinitialised_is_built_anew(name):
    description = {**models.load_description(FILES / f"{name}.yaml"), "width_multiple": 0.1}
    torch.manual_seed(1)
    fresh = models.build_model(description, 3)
    other = models.build_model(description, 3)
    with torch.no_grad():
        other.train()(torch.rand(2, 3, 64, 64))
    torch.manual_seed(1)
    models.reinitialise(other)
    found = other.state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in fresh.state_dict().items())


def test_parameters_of_no_layer_are_not_left_as_they_were(tiny):
    model = models.build_model(tiny)
    model.model[0].extra = nn.Parameter(torch.ones(3))
    with pytest.raises(models.ModelError, match=r"model\.0\.extra: belongs to no layer"):
        models.reinitialise(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth_multiple": 1e5}, "expected at most 100"),
        ({"depth_multiple": math.inf}, "depth_multiple is inf, expected a number above 0"),
        ({"width_multiple": 1e4}, r"with it the network has [\d,]+ parameters, expected at most 1,000,000,000"),
        ({"nc": 10**9}, "expected at most 1,000,000,000"),
        ({"ch": 10**9}, "expected at most 1,000,000,000"),
        ({"anchors": 10**9}, "a count up to 1000"),
        ({"backbone": [[-1, 1, "nn.Identity", []]] * 1001}, "more than 1000 layers"),
    ],
)
def test_what_would_not_fit_any_memory_is_refused_before_it_is_built(tiny, change, said):
    with pytest.raises(models.ModelError, match=said):
        models.build_model({**tiny, **change})


def test_aliases_that_expand_without_end_are_refused(tmp_path):
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines) + "\nnc: 1\n")
    with pytest.raises(models.ModelError, match=r"bomb\.yaml: 78 aliases, which can expand without end"):
        models.load_description(tmp_path / "bomb.yaml")
    (tmp_path / "deep.yaml").write_text("nc: " + "[" * 5000)
    with pytest.raises(models.ModelError, match=r"deep\.yaml: not valid YAML"):
        models.load_description(tmp_path / "deep.yaml")
