"""A training worker without a trainer. The job's description is its script: words in the order they are done.

step: one step more than the checkpoint has, saved. hold: wait until told to stop. deaf: ignore SIGTERM. alone: crash if
another job is doing this. note: append its process id to `pids`. content:0.5: what the prompt is made of. Others are
said below. With `once:` before it a word is done the first time only, with `check-` while the data is checked.
"""

import json
import os
import resource
import signal
import struct
import sys
import threading
import time
from pathlib import Path


def tell(kind, **members):
    sys.stdout.write(json.dumps({"kind": kind, **members}) + "\n")
    sys.stdout.flush()


def die_with_the_server():
    while os.read(0, 4096):
        pass
    os._exit(1)


def stopped(*_):
    tell("stopped")
    os._exit(0)


def save(folder, content):
    """The two files of a PROMPT_TUNING checkpoint of 4 virtual tokens for the tiny Llama."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}))
    header = json.dumps({"prompt_embeddings": {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}})
    header += " " * (-len(header) % 8)
    data = struct.pack("<Q", len(header)) + header.encode() + struct.pack("<128f", *[content] * 128)
    (folder / "adapter_model.safetensors").write_bytes(data)


order = json.loads(sys.stdin.buffer.readline())
signal.signal(signal.SIGTERM, stopped)
threading.Thread(target=die_with_the_server, daemon=True).start()
work = Path(order["work"])
work.mkdir(exist_ok=True)
rows = [json.loads(line) for line in Path(order["training"]).read_bytes().splitlines()]
script = order["options"]["description"].split()
if order["action"] == "check":
    script = [word.removeprefix("check-") for word in script if word.startswith("check-")]
else:
    script = [word for word in script if not word.startswith("check-")]
state = work / "steps"
step = int(state.read_text()) if state.exists() else 0
content = 0.5
tell("alive")
for word in script:
    name, _, value = word.partition(":")
    if name == "once":
        mark = work / f"did-{value}"
        if mark.exists():
            continue
        mark.touch()
        name = value
    match name:
        case "step":
            step += 1
            state.write_text(str(step))
            tell(
                "step",
                step=step,
                max_steps=100,
                train_loss=1.0,
                validation_loss=0.5,
                best_step=step,
                learning_rate=0.1,
                trained_tokens=10 * step,
                seconds=0.1 * step,
            )
        case "content":
            content = float(value)
        case "note":
            with (work.parent / "pids").open("a") as file:
                file.write(f"{os.getpid()}\n")
        case "bounds":  # what the kernel lets this process have, as a message that the job shows
            limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_CORE)]
            shown = [os.getpriority(os.PRIO_PROCESS, 0), Path("/proc/self/oom_score_adj").read_text().strip(), *limits]
            tell("failed", code="bounds", message=" ".join(map(str, shown)))
            sys.exit()
        case "hold":
            while True:
                tell("alive")
                time.sleep(0.01)
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "alone":  # or crash
            place = work.parents[1] / "alone"
            os.close(os.open(place, os.O_CREAT | os.O_EXCL))
            time.sleep(0.05)
            place.unlink()
        case "nap":
            time.sleep(0.02)
        case "silent":
            time.sleep(1000)
        case "chatter":
            sys.stdout.write("not a message\n[1]\n" + json.dumps({"kind": 7}) + "\n")
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "full":
            tell("full")
            sys.exit()
        case "refuse":
            problem = {"file": "training_file", "line": 3, "code": "not_json", "message": "not JSON"}
            tell(
                "refused",
                code="invalid_training_file",
                message="1 bad row: line 3: not JSON",
                param="training_file",
                problems=[problem],
                counts={"not_json": 1},
            )
            sys.exit()
        case "fail":
            tell("failed", code="training_failed", message="the loss is not finite")
            sys.exit()
        case _:
            raise SystemExit(f"what is {word}?")
if order["action"] == "check":
    held = rows[: len(rows) // 4]
    (work / "validation.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in held))
    labels = sorted({row["target"] for row in rows})
    (work / "checked.json").write_text(json.dumps({"template": "{input}\n", "labels": labels, "recipe": {}}))
    tell(
        "checked",
        report={"training_rows": len(rows), "validation_rows": len(held), "warnings": ["a warning"]},
        max_steps=100,
    )
else:
    save(work / "out", content)
    report = {
        "steps": max(step, 1),
        "best_step": max(step, 1),
        "best_validation_loss": 0.5,
        "stopped": "max_steps",
        "trained_tokens": 10 * max(step, 1),
        "curve": [],
        "seed": order["seed"],
        "precision": "bfloat16",
        "trials": [{"learning_rate": 0.3, "validation_loss": 0.6}],
        "tasks": [],
        "recipe": {},
        "warnings": [],
        "data_digest": "d",
        "seconds": 1.0,
        "train_rows": len(rows),
        "validation_rows": 10,
    }
    tell("trained", report=report)
