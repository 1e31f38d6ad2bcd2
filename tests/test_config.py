"""The schema: files, command line, and a message for everything that cannot be."""

import io
import re
import sys
import time
from pathlib import Path

import pytest
import yaml
from tqdm import tqdm

from stdit_fast.arguments import bar_options
from stdit_fast.errors import ConfigError
from stdit_fast.train.config import known_keys, make_buckets, model_config, parse

CONFIGS = Path(__file__).parents[1] / "train" / "configs"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("path,text\nclip.mp4,a clip\n")
    return path


@pytest.fixture
def write(tmp_path, table):
    """write(**keys) -> path of a small valid YAML with these keys over it."""

    def make(**keys) -> str:
        content = {"dataset": {"data_path": str(table)}, "buckets": {"144p": {1: [1.0, 2]}}} | keys
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return make


@pytest.mark.parametrize("name", ["tiny", "stage1", "stage2", "stage3"])
def test_shipped_configs(name, table):
    config = parse(["--config", str(CONFIGS / f"{name}.yaml"), "--dataset.data_path", str(table)])
    assert abs(sum(config.mask_ratios.values()) - 1) < 1e-9 and len(config.mask_ratios) == 9
    buckets = make_buckets(config)
    assert len(buckets) > 0
    if name != "tiny":
        assert (config.lr, config.ema_decay, config.grad_clip, config.ckpt_every) == (2e-5, 0.9999, 1.0, 500)
        assert config.plugin == "zero2" and config.grad_checkpoint == "auto"
        assert model_config(config, 4096).hidden_size == 1152
    if name == "stage1":
        own = {(b.resolution, b.num_frames): (b.keep_prob, b.batch_size) for b in buckets}
        assert own[("144p", 16)] == (1.0, 6) and own[("1024", 1)] == (0.3, 3) and own[("240p", 32)] == (0.3, 1)


def test_command_line_wins(write):
    arguments = ["--config", write(lr=1e-3), "--lr", "5e-4", "--model.depth=3", "--grad_checkpoint", "2"]
    config = parse([*arguments, "--adam_betas", "[0.9, 0.95]"])
    assert config.lr == 5e-4 and config.model.depth == 3 and config.grad_checkpoint == 2
    assert tuple(config.adam_betas) == (0.9, 0.95)
    assert parse(["--config", write(grad_checkpoint=True)]).grad_checkpoint is True


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    groups = {key.partition(".")[0] for key in known_keys() if "." in key}
    for key in set(known_keys()) - groups:
        value = r"(?:[A-Z_]+|\{[a-z,]+\}|\[ITEM,\.\.\.\])"
        (explained,) = re.findall(rf"--{re.escape(key)} {value} ?(.*?) ?\(type: ", text)
        assert explained, f"{key} is not explained"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"lrr": 1}, "lrr = 1: .* unknown key; did you mean 'lr'"),
        ({"model": {"dept": 3}}, "model.dept = 3: .* did you mean 'depth'"),
        ({"dataset": {}}, "dataset.data_path = None: name the metadata table"),
        ({"model": 3}, "model = 3: .* should have keys and values there: from_pretrained, "),
        ({"learning_rate": 1}, "learning_rate = 1: .* unknown key; did you mean 'lr'"),
        ({"dataset": {"data_path": "absent.csv"}}, "'absent.csv': there is no such file; name a metadata table"),
        ({"buckets": {"144q": {1: [1.0, 2]}}}, "did you mean '144p'"),
        ({"buckets": {"144p": {1: [1.5, 2]}}}, "1.5"),
        ({"buckets": {"144p": {1: [0.5, None]}}}, "batch size"),
        ({"buckets": {}}, "buckets"),
        ({"mask_ratios": {"mask_no": 0.5, "mask_image_head": 0.4}}, "sum to 0.9; make them sum to 1"),
        ({"mask_ratios": {"mask_none": 1.0}}, "did you mean 'mask_no'"),
        ({"plugin": "zero3"}, "plugin = 'zero3': did you mean 'zero2'"),
        ({"plugin": "zero2", "dtype": "fp32"}, "dtype = 'fp32': zero2 trains in bf16"),
        ({"scheduler": {"type": "ddpm"}}, "scheduler.type = 'ddpm': did you mean 'iddpm'"),
        ({"steps": 0}, "steps = 0: use a value at least 1"),
        ({"ema_decay": 1.5}, "ema_decay = 1.5: use a value from 0 to 1"),
        ({"adam_betas": [0.9, 1.0]}, r"adam_betas = \(0.9, 1.0\): use two values"),
        ({"adam_betas": 0.9}, r"adam_betas = '0.9': use values in brackets, such as \[0.9, 0.999\]"),
        ({"adam_eps": -1.0}, "adam_eps = -1.0: use a value at least 0"),
        ({"scheduler": {"num_timesteps": 20}}, "scheduler.num_timesteps = 20: use a value at least 21"),
        ({"text_encoder": {"model_max_length": 1}}, "text_encoder.model_max_length = 1: use a value at least 2"),
        ({"load": "absent"}, "load = 'absent': there is no such folder"),
        ({"load": str(CONFIGS)}, "load = .* it holds no state.json"),
        ({"model": {"from_pretrained": "./absent"}}, "model.from_pretrained = './absent': there is no such folder"),
        ({"vae": {"from_pretrained": "/absent/vae"}}, "vae.from_pretrained = '/absent/vae': there is no such folder"),
        ({"vae": {"from_pretrained": str(CONFIGS)}}, "vae.from_pretrained = .*: it holds no config.json"),
        ({"text_encoder": {"from_pretrained": __file__}}, "text_encoder.from_pretrained = .*: this is a file"),
        ({"model": {"from_pretrained": "absent.pth"}}, "model.from_pretrained = 'absent.pth': there is no such file"),
        ({"model": {"from_pretrained": str(CONFIGS)}}, "model.from_pretrained = .* weights, found none"),
        ({"seed": 2**32}, "seed = 4294967296: use a value from 0 to 4294967295"),
        ({"outputs": __file__}, "outputs = .*: it is a file; name a folder"),
        ({"features": {"validation_path": "x"}}, "features.validation_path = 'x': it would not be read"),
        ({"grad_checkpoint": 99}, "grad_checkpoint = 99"),
        ({"resolutions": "absent.json"}, "resolutions = 'absent.json': there is no such file"),
        ({"model": {"backend": "fast"}}, "model.backend = 'fast'"),
        ({"model": {"num_heads": 5}}, "model.num_heads = 5: use a divisor"),
        ({"model": {"mlp_ratio": 0.0}}, "model.mlp_ratio = 0.0: use a positive number"),
        ({"model": {"input_sq_size": 0}}, "model.input_sq_size = 0: use a positive number"),
        ({"lr": "much"}, "lr = 'much': use a number"),
        ({"model": {"depth": "two"}}, "model.depth = 'two': use a whole number"),
        ({"grad_checkpoint": "some"}, "grad_checkpoint = 'some': use a whole number or true or false or 'auto'"),
    ],
)
def test_refuses(write, keys, message):
    with pytest.raises(ConfigError, match=message):
        parse(["--config", write(**keys)])


def test_refuses_on_the_command_line(write, tmp_path):
    for arguments, message in (
        (["--model.dept", "3"], "model.dept = 'command line': there is no such key; did you mean 'model.depth'"),
        (["--config", str(tmp_path / "no.yaml")], "there is no such file"),
        (["--config"], "--config = None: a YAML file must follow it"),
        (["--learning_rat", "3"], "learning_rat = 'command line': there is no such key; did you mean 'lr'"),
        (["--zzz", "3"], "zzz = 'command line': there is no such key; --help lists them$"),
        (["--steps"], "steps = None: a value must follow it"),
        (["lr", "3"], "command line = 'lr 3': it belongs to no key"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(["--config", write(), *arguments])
    bad = tmp_path / "bad.yaml"
    bad.write_text("lr: [1")
    with pytest.raises(ConfigError, match="it is not YAML: .*line 1, column 5") as refused:
        parse(["--config", str(bad)])
    assert "\n" not in str(refused.value)


def test_a_log_gets_few_of_a_bars_states(monkeypatch):
    """A file keeps each; on a terminal each takes the place of the one before."""

    class Stream(io.StringIO):
        def isatty(self):
            return self.terminal

    for terminal, states in ((False, range(2, 4)), (True, range(5, 200))):
        stream = Stream()
        stream.terminal = terminal
        monkeypatch.setattr(sys, "stderr", stream)
        with tqdm(total=100, file=stream, **bar_options()) as bar:
            for _ in range(100):
                time.sleep(0.006)
                bar.update()
        assert "100/100" in stream.getvalue() and stream.getvalue().count("\r") in states
