"""The console command: helpful, quick, and one clear line when it cannot go on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from coordinator.simulation.planted.catalogue import BUGS_BY_NAME
from services import cli
from services.cli import COMMANDS, is_installed, main
from stagemesh import __version__

KNOWN = "00000000-0000-0000-0000-000000000001"


def run(capsys, *words: str) -> tuple[int, str, str]:
    try:
        status = main(words)
    except SystemExit as ended:
        status = int(ended.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_names_every_installed_command_and_loads_none(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name, command in COMMANDS.items():
        assert (f"  {name} " in out) == is_installed(command)
    code = "import sys; from services.cli import main; main(['--help']); print(sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    for heavy in ("grpc", "mlx", "transformers", "numpy", "rich", "google.protobuf"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize("name", [name for name, one in COMMANDS.items() if is_installed(one)])
def test_every_command_has_help(capsys, name):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert f"usage: stagemesh {name}" in out


def test_coordinator_and_admin_commands_need_no_mlx():
    code = (
        "import sys\n"
        "sys.modules['mlx'] = sys.modules['mlx.core'] = sys.modules['mlx_lm'] = None\n"
        "import services.cli_admin, services.cli_process, services.cli_generate, services.cli_up\n"
        "import services.run_coordinator, services.client, services.up\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_command_is_bad_usage_and_a_typo_gets_a_hint(capsys):
    assert run(capsys)[0] == 2
    status, _, err = run(capsys, "statsu")
    assert status == 2
    assert "did you mean `status`" in err
    assert run(capsys, "--version")[1] == f"stagemesh {__version__}\n"


SIMULATED = {
    "seeds", "faults", "events", "tokens", "violations", "cells", "rarest_cells", "counters",
    "requests_failed", "planted", "seconds", "environment", "version",
}  # fmt: skip


def test_simulate_reports_clean_seeds_as_one_json_object(capsys):
    status, out, _ = run(capsys, "simulate", "--seeds", "0:2", "--jobs", "1", "--json")
    document = json.loads(out)
    assert (status, set(document), document["violations"]) == (0, SIMULATED, [])
    assert document["seeds"] == 2
    assert min(document[what] for what in ("faults", "events", "tokens")) > 0
    assert sum(document["cells"].values()) == document["faults"]


def test_simulate_ends_with_1_and_names_the_seed_where_an_invariant_is_violated(capsys):
    with BUGS_BY_NAME["nacks have no budget"].planted():
        words = ("simulate", "--seeds", "5:6", "--jobs", "1")
        status, out, err = run(capsys, *words, "--json")
        shown = run(capsys, *words)
    (one, *_) = json.loads(out)["violations"]
    assert (status, one["seed"], one["invariant"]) == (1, 5, "I16")
    assert one["replay"] == "stagemesh simulate --seeds 5:6"
    assert one["replay"] in err
    assert shown[0] == 1
    assert f"seed 5: I16: {one['detail']}" in shown[1]


def test_simulate_hunts_planted_bugs_and_ends_with_1_if_one_survives(capsys):
    words = ("simulate", "--bug", "nacks have no budget", "--jobs", "1", "--json")
    status, out, _ = run(capsys, *words, "--seeds", "5:6")
    (kill,) = json.loads(out)["planted"]["bugs"].values()
    assert (status, kill["seed"]) == (0, 5)
    status, out, err = run(capsys, *words, "--seeds", "0:1")
    assert (status, json.loads(out)["planted"]["killed"]) == (1, 0)
    assert "SURVIVED" in err


@pytest.mark.parametrize("seeds", ["5:5", "a:b", "7:2", "-1:2"])
def test_seeds_that_are_none_are_bad_usage(capsys, seeds):
    status, _, err = run(capsys, "simulate", f"--seeds={seeds}")
    assert (status, "seeds" in err) == (2, True)


def test_check_config_shows_every_value_and_where_it_came_from(capsys, tmp_path, monkeypatch):
    path = tmp_path / "mesh.toml"
    path.write_text("[mesh]\nstages = 4\n")
    monkeypatch.setenv("STAGEMESH_THREADS", "3")
    status, out, _ = run(capsys, "check-config", "--config", str(path), "--dtype", "f16", "--json")
    assert status == 0
    document = json.loads(out)
    rows = {row["setting"]: (row["value"], row["source"]) for row in document["settings"]}
    assert rows["stages"] == ("4", f"{path} [mesh]")
    assert rows["threads"] == ("3", "STAGEMESH_THREADS")
    assert rows["dtype"] == ("f16", "--dtype")
    assert document["version"] == __version__
    assert len(document["fingerprint"]) == 64


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check-config", "--stages", "many"], "stages: 'many'"),
        (["check-config", "--config", "/nowhere.toml"], "cannot read /nowhere.toml"),
        (["generate"], "one of PROMPT, --messages, --prompts and --resume"),
        (["generate", "hi", "--prompts", "x"], "one of PROMPT"),
        (["generate", "--prompts", "/nowhere.json"], "cannot read"),
        (["generate", "hi", "--max-tokens", "-3", "--address", "127.0.0.1:1"], "out of range"),
        (["generate", "hi", "--resume", KNOWN, "--address", "127.0.0.1:1"], "one of PROMPT"),
        (["generate", "--resume", "me", "--address", "127.0.0.1:1"], "not a UUID"),
        (["generate", "hi", "--request-id", "me", "--address", "127.0.0.1:1"], "not a UUID"),
        (["generate", "bytes \udcff", "--address", "127.0.0.1:1"], "not Unicode text"),
        (
            ["generate", "hi", "--model", "m\udcff", "--address", "127.0.0.1:1"],
            "no Unicode text where text belongs: 'm\\udcff' [INVALID_CONFIGURATION]",
        ),
        (["status", "--address", "m\udcff"], "no Unicode text where text belongs: "),
        (["trace", "m\udcff", "--address", "127.0.0.1:1"], "no Unicode text where text belongs: "),
        (
            ["generate", "--resume", KNOWN, "--from-position=-1", "--address", "127.0.0.1:1"],
            "from_position",
        ),
        (
            ["generate", "--resume", KNOWN, "--from-position", "4294967296", "--address", "h:1"],
            "from_position",
        ),
        (["up", "--spans", "0-2,1-4", "--model", "tiny"], "more than one stage"),
        (["up", "--stages", "9", "--model", "tiny"], "cannot be split"),
        (["support", "no_such_type"], "no_such_type"),
        (["up", "--model", "tiny", "--listen", "0.0.0.0:0"], "beyond loopback without TLS"),
        (["generate", "hi", "--address", "127.0.0.1:1", "--stages", "3"], "--stages is for a mesh"),
        (["chat", "--address", "127.0.0.1:1", "--no-full-worker"], "--no-full-worker is for"),
    ],
)
def test_bad_usage_is_one_clear_line_and_status_2(capsys, words, said):
    status, _, err = run(capsys, *words)
    assert status == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "--address", "127.0.0.1:1"], "cannot be reached"),
        (["up", "--model", "/no/such/model"], "neither a directory"),
        (["model", "import", "./none.gguf"], "no such file"),
    ],
)
def test_what_fails_is_one_clear_line_and_status_1(capsys, words, said):
    status, _, err = run(capsys, *words)
    assert status == 1
    assert said in err
    assert "Traceback" not in err


def test_health_is_1_where_nobody_answers_and_2_for_bad_usage(capsys):
    status, _, err = run(capsys, "health", "--address", "127.0.0.1:1", "--timeout", "0.3")
    assert (status, "no connection to 127.0.0.1:1" in err) == (1, True)
    assert run(capsys, "health", "--tls-ca", "x")[0] == 2


async def test_health_of_a_process_that_serves_and_of_one_that_does_not(serve):
    from services.cli_admin import HEALTH_NOT_SERVING, HEALTH_SERVING, _health
    from services.server import MeshServer, ServerOptions

    server = MeshServer(ServerOptions("127.0.0.1:0"))
    await server.start()

    def arguments(address: str, service: str = ""):
        import argparse

        return argparse.Namespace(
            address=address, service=service, timeout=5.0, config=None, worker=False
        )

    try:
        server.set_serving(serving=True)
        server.health.set("", serving=True)
        assert await _health(arguments(server.address)) == HEALTH_SERVING
        server.health.set("", serving=False)
        assert await _health(arguments(server.address)) == HEALTH_NOT_SERVING
        assert await _health(arguments(server.address, "nobody")) == HEALTH_NOT_SERVING
    finally:
        await server.drain(0)


def test_models_are_imported_and_listed_as_json(capsys):
    status, out, _ = run(capsys, "model", "import", "tiny", "--json")
    assert status == 0
    imported = json.loads(out)
    assert len(imported["fingerprint"]) == 64
    status, out, _ = run(capsys, "model", "list", "--json")
    models = {one["name"]: one for one in json.loads(out)["models"]}
    assert "smollm2" in models
    assert imported["directory"] in [one["directory"] for one in models.values()]


def test_certificates_are_made_and_renewed(capsys, tmp_path):
    for _ in range(2):
        status, out, _ = run(capsys, "certs", "init", "--directory", str(tmp_path), "--json")
        assert status == 0
        files = json.loads(out)["files"]
        assert {"ca.pem", "coordinator.pem", "coordinator.key"} <= set(files)


def test_prompt_files_are_lists_or_lines(tmp_path):
    from services.cli_common import read_prompts
    from stagemesh.errors import InvalidConfiguration

    path = tmp_path / "prompts"
    path.write_text('["one", "two"]')
    assert read_prompts(str(path)) == [{"prompt": "one"}, {"prompt": "two"}]
    path.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "x"}]}\n')
    assert len(read_prompts(str(path))) == 2
    for bad in ('{"text": "x"}', "{", "[3]"):
        path.write_text(bad)
        with pytest.raises(InvalidConfiguration):
            read_prompts(str(path))
    path.write_bytes(b'["caf\xe9"]')
    with pytest.raises(InvalidConfiguration, match="not UTF-8"):
        read_prompts(str(path))
    path.write_text('{"prompt": "one line\u2028to JSON"}\n', encoding="utf-8")
    assert read_prompts(str(path)) == [{"prompt": "one line\u2028to JSON"}]


@pytest.mark.parametrize(
    "entry", ['{"prompt": 7}', '{"messages": [{"role": "user", "content": null}]}']
)
def test_what_is_no_text_is_never_asked(capsys, tmp_path, entry):
    path = tmp_path / "prompts.jsonl"
    path.write_text(entry)
    status, _, err = run(capsys, "generate", "--prompts", str(path), "--address", "127.0.0.1:1")
    assert (status, "text" in err) == (2, True)


def test_a_request_id_is_for_one_prompt(capsys, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('["one", "one"]')
    status, _, err = run(
        capsys, "generate", "--prompts", str(path), "--request-id", KNOWN, "--address", "h:1"
    )
    assert (status, "names one answer" in err) == (2, True)


async def test_a_resumed_answer_has_the_deadline_that_was_given(serve):
    import argparse
    import asyncio

    from services.cli_generate import _resume
    from stagemesh.errors import DeadlineExceeded
    from stagemesh.v1 import generation_service_pb2 as pb

    async with serve() as edge, asyncio.timeout(20):
        edge.ports.pause()
        asked = edge.client.generation.Generate(
            pb.GenerateRequest(text="hi", request_id=KNOWN, detach=True)
        )
        await asked.initial_metadata()
        arguments = argparse.Namespace(
            resume=KNOWN, from_position=0, json=True, timeout=0.2, address=edge.address
        )
        with pytest.raises(DeadlineExceeded):
            await _resume(edge.client, arguments)


def test_generate_and_status_print_the_contracts_names(capsys, serve):
    """Against a loopback server in another thread: commands own their event loop."""
    import asyncio
    import threading

    ready, done = threading.Event(), threading.Event()
    found: dict[str, str] = {}

    def host() -> None:
        async def main_() -> None:
            async with serve() as edge:
                found["address"] = edge.address
                ready.set()
                await asyncio.to_thread(done.wait, 60)

        asyncio.run(main_())

    thread = threading.Thread(target=host)
    thread.start()
    try:
        assert ready.wait(30)
        address = found["address"]
        status, out, _ = run(
            capsys, "generate", "hi", "--raw", "--max-tokens", "4", "--ignore-eos", "--json",
            "--address", address,
        )  # fmt: skip
        assert status == 0
        *lines, last = (json.loads(line) for line in out.splitlines())
        names = {"request_id", "position", "token_ids", "text", "epoch", "verified_through"}
        assert all(names <= set(line) for line in lines)
        assert last["token_ids"] == [one for line in lines for one in line["token_ids"]]
        assert last["text"] == "".join(line["text"] for line in lines)
        assert {
            "finish_reason", "usage", "ttft_ms", "tokens_per_second", "route", "recoveries",
            "environment", "version",
        } <= set(last)  # fmt: skip
        assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 4}
        status, out, _ = run(
            capsys, "generate", "hi", "--raw", "--max-tokens", "4", "--ignore-eos", "--json",
            "--logprobs", "1", "--address", address,
        )  # fmt: skip
        lines = [json.loads(line) for line in out.splitlines()[:-1]]
        assert all(len(line["logprobs"]) == len(line["token_ids"]) for line in lines[:-1])
        status, out, _ = run(capsys, "status", "--json", "--address", address)
        document = json.loads(out)
        assert document["environment"]["dtype"] == document["workers"][0]["dtype"]
        assert not [name for name in document["environment"] if name.startswith("journal")]
        assert {"running", "queued", "finished", "failed"} <= set(document["requests"])
        worker = document["workers"][0]
        assert {
            "name", "pid", "address", "span", "stage_index", "state", "epoch",
            "weights_fingerprint", "in_flight", "kv_tokens",
        } <= set(worker)  # fmt: skip
        assert run(capsys, "status", "--address", address)[0] == 0
        status, _, err = run(capsys, "generate", "hi", "--model", "x", "--address", address)
        assert status == 0 or "serves" in err
        status, _, err = run(capsys, "generate", "hi", "--temperature=-2", "--address", address)
        assert (status, "temperature" in err) == (2, True)
        assert run(capsys, "trace", "nonsense", "--address", address)[0] == 2
    finally:
        done.set()
        thread.join(30)


def test_an_interrupted_command_says_nothing_and_returns_130(monkeypatch, capsys):
    import services.cli_process

    def interrupted(_arguments) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(services.cli_process, "run", interrupted)
    assert run(capsys, "check-config")[0] == cli.EXIT_INTERRUPTED
