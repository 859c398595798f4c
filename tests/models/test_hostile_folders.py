"""Model folders that strangers made: loading or checking one reads, writes, downloads and runs nothing beside it.

The attacks are built here. `DCVIT_FUZZ` sets how many hostile folders the last test makes.
"""

import json
import os
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dcvit
from dcvit.artifacts.result import save_model
from dcvit.errors import DcvitError, UnsupportedModelError
from dcvit.models import load_model
from tests.artifacts.test_fuzz import mutated
from tests.without_dcvit import run_without

EVA = ("vit_small_patch16_dinov3", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 4})
EVA02 = ("eva02_tiny_patch14_224", {**EVA[1], "img_size": 28})
RESNET = ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "num_classes": 4})
VIT = (
    "vit_tiny_patch16_224",
    {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 4},
)
SWIN = (
    "swin_tiny_patch4_window7_224",
    {"img_size": 16, "window_size": 2, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 4},
)


def saved(kind: tuple[str, dict[str, Any]], folder: Path) -> Path:
    save_model(timm.create_model(kind[0], **kind[1]).eval(), folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


class Watch:
    """What this process does while it is watched: files that it opens to write, reads outside, connections.

    Python tells every such thing to an audit hook, whoever does it. A hook cannot be taken away, so one serves all.
    """

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.seen: list[str] = []
        self.thread: int | None = None
        sys.addaudithook(self._look)

    def _look(self, event: str, details: tuple[Any, ...]) -> None:
        if self.thread != threading.get_ident():
            return
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind"):
            self.seen.append(f"{event} {details[-1]}")
            raise PermissionError("no connections here")
        if event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod",
                     "os.system", "os.exec", "subprocess.Popen", "shutil.copyfile", "urllib.Request"):  # fmt: skip
            self.seen.append(f"{event} {details}")
        if event == "open" and isinstance(details[0], (str, bytes)):
            path, mode, flags = os.fsdecode(details[0]), details[1], details[2]
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (mode and set(mode) & set("wax+")):
                self.seen.append(f"write {path}")
            elif not os.path.realpath(path).startswith(self.allowed):
                self.seen.append(f"read {path}")

    @contextmanager
    def __call__(self, *folders: Path) -> Iterator[list[str]]:
        code = {sys.prefix, sys.base_prefix, str(Path(dcvit.__file__).parent), str(Path(timm.__file__).parent)}
        self.allowed = (*(os.path.realpath(place) + os.sep for place in (*folders, *code)), "/proc/", "/sys/")
        self.seen, self.thread = [], threading.get_ident()
        try:
            yield self.seen
        finally:
            self.thread = None


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A server of an attacker's file on this machine, and what was asked of it."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(format % args)

    (tmp_path / "served").mkdir()
    torch.save({}, tmp_path / "served" / "evil.pth")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served"))) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}/evil.pth", asked
        found.shutdown()
        thread.join()


# What a config may say.


def attack(url: str, target: Path) -> dict[str, Any]:
    return {"pretrained": True, "cache_dir": str(target), "pretrained_cfg": {"url": url, "num_classes": 4}}


@pytest.mark.parametrize("kind", [EVA, RESNET], ids=["eva", "cnn"])
def test_a_base_downloads_nothing(kind: Any, tmp_path: Path, server: tuple[str, list[str]]) -> None:
    """With dcvit, before or after the check, and without it."""
    url, asked = server
    folder, target = saved(kind, tmp_path / "evil"), tmp_path / "target"
    edit(folder, lambda config: config["model_args"]["base_args"].update(attack(url, target)))
    for load in (load_model, partial(timm.create_model, pretrained=False), partial(timm.create_model, pretrained=True)):
        with pytest.raises(ValueError, match="base_args has 'pretrained', which is not among"):
            load(f"local-dir:{folder}")
    code = f"""
import sys, timm
sys.path.insert(0, {str(folder)!r})
import modeling_dcvit
for pretrained in (False, True):
    try:
        timm.create_model("local-dir:" + {str(folder)!r}, pretrained=pretrained)
    except ValueError as error:
        print(error)
"""
    assert run_without(code, tmp_path).count("base_args has 'pretrained'") == 2
    assert not target.exists()
    assert not asked


HOSTILE_ARGUMENTS = [
    {"pretrained": True}, {"pretrained_cfg": {"file": "/etc/passwd"}}, {"pretrained_cfg_overlay": {"url": "http://x"}},
    {"checkpoint_path": "/etc/passwd"}, {"cache_dir": "/tmp/x"}, {"features_only": True}, {"scriptable": True},
    {"pruned": True}, {"pretrained_strict": False}, {"pretrained_filter_fn": "os.system"}, {"model_cfg": {}},
    {"pretrained_model_args": {}}, {"device": "cuda"}, {"use_naflex": True},
    {"norm_layer": "../../etc"}, {"depth": 1 << 20}, {"mlp_ratio": float("inf")}, {"mlp_ratio": float("nan")},
    {"act_layer": {"type": "relu"}}, {"patch_size": [[[16]]]},
]  # fmt: skip


@pytest.mark.parametrize("arguments", HOSTILE_ARGUMENTS, ids=lambda values: "-".join(values))
@pytest.mark.parametrize("place", ["base_args", "model_args of timm's", "model_args of dcvit's"])
def test_arguments_that_do_more_than_shape_a_model(place: str, arguments: Any, tmp_path: Path, watch: Watch) -> None:
    folder = saved(EVA, tmp_path / "evil")
    if place == "base_args":
        edit(folder, lambda config: config["model_args"]["base_args"].update(arguments))
    elif place == "model_args of dcvit's":
        edit(folder, lambda config: config["model_args"].update(arguments))
    else:
        edit(folder, lambda config: config.update(architecture=EVA[0], model_args={**EVA[1], **arguments}))
    with watch(folder) as seen, pytest.raises(UnsupportedModelError):
        load_model(f"local-dir:{folder}")
    assert not seen


@pytest.mark.parametrize(
    "base",
    ["local-dir:/tmp", "hf-hub:timm/resnet18.a1_in1k", "dcvit_eva", "dcvit_vision_transformer", "resnet18",
     "eva02_tiny_patch14_224.mim_in22k", "os.system", "", None, 3, ["resnet18"]],
    ids=str,
)  # fmt: skip
def test_a_base_is_a_plain_name_of_its_family(base: Any, tmp_path: Path, watch: Watch) -> None:
    folder = saved(EVA, tmp_path / "evil")
    edit(folder, lambda config: config["model_args"].update(base=base))
    with watch(folder) as seen, pytest.raises(UnsupportedModelError, match=r"base=|'base'"):
        load_model(f"local-dir:{folder}")
    assert not seen


@pytest.mark.parametrize(
    "source",
    [{"url": "http://127.0.0.1:9/x.pth", "source": "url"}, {"file": "/etc/passwd"}, {"hf_hub_id": "timm/resnet18"},
     {"hf_hub_id": "timm/resnet18", "hf_hub_filename": "x", "source": "hf-hub", "custom_load": "hf"},
     {"state_dict": {"head.weight": 1}}, {"custom_load": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", [VIT, SWIN], ids=["vit", "swin"])
def test_weights_come_from_the_folder_whatever_the_config_says(
    kind: Any, source: dict[str, Any], tmp_path: Path, watch: Watch
) -> None:
    folder = saved(kind, tmp_path / "model")
    edit(folder, lambda config: config["pretrained_cfg"].update(source))
    with watch(folder) as seen:
        model: Any = load_model(f"local-dir:{folder}")
    assert not seen
    assert torch.equal(
        model.patch_embed.proj.weight, load_file(folder / "model.safetensors")["patch_embed.proj.weight"]
    )
    assert model.pretrained_cfg.keys().isdisjoint({"url", "hf_hub_id", "hf_hub_filename", "state_dict"})


def test_a_watched_process_is_seen(tmp_path: Path, watch: Watch) -> None:
    """What the tests here rely on: a connection, a file outside, and a link that leads there are noticed."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("")
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "secret")
    with watch(tmp_path / "inside") as seen:
        with pytest.raises(PermissionError), socket.socket() as client:
            client.connect(("127.0.0.1", 9))
        (tmp_path / "inside" / "link").read_text()
        (tmp_path / "secret").write_text("")
    assert [line.split()[0] for line in seen] == ["socket.connect", "read", "write"]


# How large a model may be.


def of_swin(config: dict[str, Any], window: int) -> None:
    config["model_args"].update(img_size=[4 * window, 4 * window], window_size=[[window, window]] * 2)


BOMBS: dict[str, tuple[Any, Callable[[dict[str, Any]], object]]] = {
    "depth": (VIT, lambda config: config["model_args"].update(depth=65536)),
    "depth of a base": (EVA, lambda config: config["model_args"]["base_args"].update(depth=65536)),
    "blocks of a stage": (RESNET, lambda config: config["model_args"]["base_args"].update(layers=[65536] * 4)),
    "depth, all of it dropped": (
        VIT,
        lambda config: config["model_args"].update(
            depth=30000, per_layer_config={str(i): {"skip": ["attention", "mlp"]} for i in range(2, 30000)}
        ),
    ),
    "width, all of it dropped": (
        VIT,
        lambda config: config["model_args"].update(
            intermediate_size=65536,
            depth=300,
            per_layer_config={str(i): {"skip": ["attention", "mlp"]} for i in range(300)},
        ),
    ),
    "windows": (SWIN, partial(of_swin, window=128)),
    "images": (VIT, lambda config: config["model_args"].update(img_size=[65536, 65536])),
    "positions that are not stored": (EVA02, lambda config: config["model_args"].update(img_size=[65536, 65536])),
    "registers": (VIT, lambda config: config["model_args"].update(reg_tokens=65536, embed_dim=65536)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_once(name: str, tmp_path: Path) -> None:
    kind, change = BOMBS[name]
    folder = saved(kind, tmp_path / "bomb")
    edit(folder, change)
    start = time.process_time()
    with pytest.raises(UnsupportedModelError, match=r"different models|could not be loaded"):
        load_model(f"local-dir:{folder}")
    assert time.process_time() - start < 10


def test_empty_tensors_raise_no_limit(tmp_path: Path) -> None:
    folder = saved(VIT, tmp_path / "bomb")
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 1 << 50], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    edit(folder, lambda config: config["model_args"].update(depth=1 << 40))
    with pytest.raises(UnsupportedModelError, match="no size of the weights is above 65536"):
        load_model(f"local-dir:{folder}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_are_of_bounded_size(name: str, tmp_path: Path) -> None:
    folder = saved(VIT, tmp_path / "bomb")
    with (folder / name).open("r+b") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(UnsupportedModelError, match="more than the"):
        load_model(f"local-dir:{folder}")


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    folder = saved(VIT, tmp_path / "bomb")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(91_000_000)
    with pytest.raises(UnsupportedModelError, match=r"header of model\.safetensors has 90,000,000 bytes"):
        load_model(f"local-dir:{folder}")


@pytest.mark.parametrize("window", [4, 24])
def test_larger_windows_and_images_load(window: int, tmp_path: Path) -> None:
    """Their tables are many times the weights, and are not stored."""
    size = {**SWIN[1], "img_size": 8 * window, "window_size": window}
    folder = saved((SWIN[0], size), tmp_path / "model")
    model: Any = load_model(f"local-dir:{folder}")
    assert model.layers[0].blocks[0].window_size == (window, window)


def test_weights_of_other_shapes_are_not_resampled(tmp_path: Path) -> None:
    """A patch of 1000 × 1000 would be, by a matrix of as many rows as it has pixels."""
    folder = saved(VIT, tmp_path / "bomb")
    weights = load_file(folder / "model.safetensors")
    weights["patch_embed.proj.weight"] = torch.zeros(16, 3, 1000, 1000, dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"patch_embed\.proj\.weight is of shape \[16, 3, 1000, 1000\]"):
        load_model(f"local-dir:{folder}")


# What lies under the names of its files.


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs and devices are those of Unix")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link", "dangling", "link to a device"])
def test_only_regular_files_are_read(kind: str, name: str, tmp_path: Path, watch: Watch) -> None:
    folder = saved(VIT, tmp_path / "evil")
    file = folder / name
    outside = shutil.move(file, tmp_path / "outside")
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        target = {"link": outside, "dangling": tmp_path / "nothing"}.get(kind, "/dev/zero")
        file.symlink_to(target)
    with watch(folder) as seen, pytest.raises(UnsupportedModelError, match=r"regular file|link to outside"):
        load_model(f"local-dir:{folder}")
    assert not seen


def test_a_snapshot_of_the_hubs_cache_loads(tmp_path: Path) -> None:
    """Its files are links into the blobs of the same repository; those into another are refused."""
    folder = saved(VIT, tmp_path / "models--a--b" / "snapshots" / "0123")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.move(folder / name, blobs / name)
        (folder / name).symlink_to(Path("..", "..", "blobs", name))
    load_model(f"local-dir:{folder}")
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(blobs / "config.json", other)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(other / "config.json")
    with pytest.raises(UnsupportedModelError, match=r"config\.json' is a link to outside of the folder: copy"):
        load_model(f"local-dir:{folder}")


# What loading leaves behind.


@pytest.mark.parametrize("kind", [VIT, EVA, SWIN, RESNET], ids=["vit", "eva", "swin", "cnn"])
def test_loading_draws_nothing_from_the_callers_random_state(kind: Any, tmp_path: Path) -> None:
    """Nor does it set that state back, which another thread may be drawing from."""
    folder = saved(kind, tmp_path / "model")
    drawn: list[torch.Tensor] = []
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            drawn.append(torch.rand(1))
            time.sleep(0.001)

    torch.manual_seed(0)
    expected = torch.get_rng_state()
    load_model(f"local-dir:{folder}")
    assert torch.equal(torch.get_rng_state(), expected)
    torch.manual_seed(0)
    thread = threading.Thread(target=draw)
    thread.start()
    load_model(f"local-dir:{folder}")
    stop.set()
    thread.join()
    torch.manual_seed(0)
    assert torch.equal(torch.cat(drawn), torch.cat([torch.rand(1) for _ in drawn]))


def test_the_demo_model_does_not_change_the_random_state() -> None:
    expected = torch.get_rng_state()
    load_model("demo")
    assert torch.equal(torch.get_rng_state(), expected)


# Whom the command line asks.


def test_an_original_is_fetched_only_if_the_user_names_it(
    tmp_path: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dcvit.cli import main

    folder = saved(VIT, tmp_path / "small")
    for name in ("hf-hub:evil/model", "local-dir:/tmp", "vit_tiny_patch16_224"):
        (folder / "result.json").write_text(json.dumps({"report": {"model": name}}))
        with watch(folder, Path.cwd()) as seen:
            assert main(["latency", str(folder), "--original"]) == 2
        assert not seen
        assert f"compressed from '{name}', which may be a download" in capsys.readouterr().err
    asked = ["latency", str(folder), "--original", "demo", "--batch-size", "1", "--runs", "1", "--warmup", "0"]
    main(asked)  # the demo model takes other images: it is the first that is loaded
    assert "demo" in "".join(capsys.readouterr())


# What timm's scripts pass.


@pytest.mark.parametrize("kind", [VIT, EVA, SWIN, RESNET], ids=["vit", "eva", "swin", "cnn"])
def test_arguments_of_timms_scripts_reach_every_family(kind: Any, tmp_path: Path) -> None:
    """As train.py and validate.py pass them to `create_model`; what is None is left out there."""
    folder = saved(kind, tmp_path / "model")
    model: Any = timm.create_model(
        f"local-dir:{folder}", pretrained=True, in_chans=3, num_classes=3, drop_rate=0.1, drop_path_rate=0.1,
        drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path="",
    )  # fmt: skip
    assert model.train()(torch.randn(2, 3, *(kind[1].get("img_size", 32),) * 2)).shape == (2, 3)
    assert any("drop_prob" in part.__dict__ and part.drop_prob > 0 for part in model.modules())


# All at once.

DEFAULT_FOLDERS, SECONDS, BYTES = 200, 10, 1 << 30

hostile = settings(
    max_examples=int(os.environ.get("DCVIT_FUZZ", DEFAULT_FOLDERS)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)

KINDS = {"vit": VIT, "eva": EVA, "eva02": EVA02, "swin": SWIN, "cnn": RESNET}

names = st.sampled_from(
    [*sorted({name for arguments in HOSTILE_ARGUMENTS for name in arguments}), "url", "file", "hf_hub_id", "state_dict",
     "source", "custom_load", "architecture", "base", "img_size", "depths", "num_heads", "window_size", "embed_dim",
     "in_chans", "num_classes", "reg_tokens", "intermediate_size", "layers", "channels", "label_offset", "first_conv",
     "classifier", "fixed_input_size", "input_size", "skip"]
)  # fmt: skip
sizes = st.sampled_from([0, 1, 2, 3, 7, 128, 4096, 65536, 65537, 1 << 31, 1 << 62, -1, 0.5, 1e30, float("nan")])
words = st.sampled_from(
    ["/etc/passwd", "../../secret", "http://127.0.0.1:9/x.pth", "hf-hub:timm/resnet18.a1_in1k", "local-dir:/tmp", "url",
     "hf-hub", "local-dir", "file", "hf", "cuda", "meta", "os.system", "resnet18", "levit_128", "tiny_vit_5m_224",
     "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "naflexvit_base_patch16_gap", "dcvit_eva", "dcvit_residual_cnn"]
)  # fmt: skip
values = (
    sizes | words | st.booleans() | st.lists(sizes | words, max_size=4)
    | st.dictionaries(names, sizes | words | st.booleans(), max_size=3)
)  # fmt: skip


def with_hostile_values(config: dict[str, Any], draw: st.DataObject) -> dict[str, Any]:
    """A config of which one to three tables got, or had replaced, a value that may lead somewhere."""
    for _ in range(draw.draw(st.integers(1, 3))):
        args = config.get("model_args")
        tables = [config, args, config.get("pretrained_cfg")]
        tables += [args.get("base_args"), args.get("per_layer_config")] if isinstance(args, dict) else []
        tables = [table for table in tables if isinstance(table, dict)]
        table = tables[draw.draw(st.integers(0, len(tables) - 1))]
        known = sorted(map(str, table))
        name = draw.draw(names | st.sampled_from(known) if known else names)
        table[name] = draw.draw(values)
    return config


def forged_header(valid: bytes, draw: st.DataObject) -> bytes:
    """A file of weights that says other names, types, shapes or places of its tensors."""
    (length,) = struct.unpack("<Q", valid[:8])
    header = json.dumps(mutated(json.loads(valid[8 : 8 + length]), draw)).encode()
    return struct.pack("<Q", len(header)) + header + valid[8 + length :]


def lay_out(folder: Path, kind: str, valid: dict[str, bytes], outside: Path, draw: st.DataObject) -> None:
    """Write a hostile folder: two files as they were saved, of which one is changed, or something in its place."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in valid.items():
        (folder / name).write_bytes(content)
    how = draw.draw(st.sampled_from(["values"] * 6 + ["mutated"] * 3 + ["header", "special"]))
    file = folder / draw.draw(st.sampled_from(["config.json", "model.safetensors"]))
    config = json.loads(valid["config.json"])
    if how == "values":
        (folder / "config.json").write_text(json.dumps(with_hostile_values(config, draw)))
    elif how == "mutated":
        (folder / "config.json").write_text(json.dumps(mutated(config, draw)))
    elif how == "header":
        (folder / "model.safetensors").write_bytes(forged_header(valid["model.safetensors"], draw))
    else:
        file.unlink()
        special = draw.draw(st.sampled_from(["fifo", "folder", "hole", "secret", "device", "itself", "other"]))
        if special == "fifo" and hasattr(os, "mkfifo"):
            os.mkfifo(file)
        elif special == "folder":
            file.mkdir()
        elif special == "hole":
            with file.open("wb") as opened:
                opened.truncate(1 << 42)
        else:
            targets = {"secret": outside / "secret", "device": Path("/dev/zero"), "itself": file}
            file.symlink_to(targets.get(special, folder / "config.json"))


def peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, float]]:
    found = {"folders": 0.0, "loaded": 0.0, "slowest": 0.0, "start": time.perf_counter(), "bytes": peak_bytes()}
    yield found
    seconds = time.perf_counter() - found.pop("start")
    print(f"\n{found}, {seconds:.0f} s, {peak_bytes() - found['bytes']:,.0f} bytes more at the peak")


@pytest.fixture(scope="module")
def valid_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    place = tmp_path_factory.mktemp("valid")
    found = {}
    for kind, model in KINDS.items():
        folder = saved(model, place / kind)
        load_model(f"local-dir:{folder}")
        found[kind] = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="the peak of memory is told by Unix")
@hostile
@given(draw=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_hostile_folders(
    draw: st.DataObject,
    kind: str,
    watch: Watch,
    valid_folders: dict[str, dict[str, bytes]],
    figures: dict[str, float],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Nothing outside is read or written, no network is asked for, and an answer comes soon, in little memory."""
    outside = tmp_path_factory.getbasetemp() / "outside"
    if not outside.exists():
        outside.mkdir()
        (outside / "secret").write_bytes(valid_folders[kind]["config.json"])
    folder = outside / "evil"
    lay_out(folder, kind, valid_folders[kind], outside, draw)
    start = time.process_time()  # on a busy machine, the wall clock would measure the other processes
    with watch(folder) as seen:
        try:
            load_model(f"local-dir:{folder}")
            figures["loaded"] += 1
        except DcvitError:
            pass
    seconds = time.process_time() - start
    assert not seen
    assert seconds < SECONDS
    assert peak_bytes() - figures["bytes"] < BYTES
    assert sorted(os.listdir(outside)) == ["evil", "secret"]
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    figures["folders"] += 1
    figures["slowest"] = max(figures["slowest"], seconds)
