"""The client's side: three calls that need neither Ray nor vLLM nor DeepSpeed (`pip install 'gt-ray[client]'`).

    fetch_root("http://127.0.0.1:8000")
    finetune(Path("my.jsonl"), "gsm8k")
    send([Path("update.safetensors")], Path("adapter"))

Data never leaves the machine: `send` transfers update files alone, and says beforehand what stands in them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gt_ray.config import FineTuneSettings, LoraSettings, ModelSettings
from gt_ray.errors import UserError
from gt_ray.pairs.models import EMBEDDED_PREFIX, resolve
from gt_ray.pairs.root import Root, hash_root
from gt_ray.progress import bar, say
from gt_ray.serving.endpoint import Endpoint, unpack, with_base
from gt_ray.serving.ledger import Ledger
from gt_ray.updates.adapters import Adapter
from gt_ray.updates.files import write_atomically
from gt_ray.updates.pooling import Pooling
from gt_ray.updates.store import unit_key
from gt_ray.updates.update_files import UpdateInfo, read_update, write_update

ROOT_FOLDER = Path("gt-ray-root")
ROOT, SERVICE = "root.safetensors", "service.json"


def fetch_root(url: str, folder: Path = ROOT_FOLDER, model: str | None = None, checkpoint: str | None = None) -> Root:
    """Fetch the TinyLM's root, and check it against the base model on this machine.

    Args:
        folder: keeps the root and what the service says of itself.
        model: base model, where it is not the one that the service names: a Hub id or a folder.
        checkpoint: name of one; none: the service's default.

    Raises:
        UserError: the service or the base model is not there, or the root is of another base model.
    """
    endpoint = Endpoint(url)
    known = endpoint.info()["checkpoints"]
    one = next((one for one in known if checkpoint in (None, one["name"])), None)
    if one is None:
        raise UserError(f"{url} has no checkpoint {checkpoint!r}; it has {', '.join(one['name'] for one in known)}")
    fetched = folder / f".{ROOT}.unchecked"
    root = with_base(endpoint.root(one["tinylm"]["root"], fetched), model)
    fetched.unlink()
    try:
        found = hash_root(resolve(root.base_model), root.lora, root.initial, root.fixed)
    except UserError as error:
        raise UserError(f"the base model of the root is needed here: {error} (--model names another place)") from error
    if found != root.hash:
        raise UserError(
            f"{root.base_model} with this root hashes to {found}, not to {root.hash}: it is another base model, or "
            "another revision of it; name the right one (--model)"
        )
    root.save(folder / ROOT)
    write_atomically(folder / SERVICE, json.dumps({"url": endpoint.url, "checkpoint": one}, indent=1).encode())
    say(f"root {root.hash[:12]} of {root.base_model}: checked against the base model here; kept in {folder}")
    return root


def finetune(
    data: Path,
    task: str,
    out: Path = Path("update.safetensors"),
    folder: Path = ROOT_FOLDER,
    seed: int = 0,
    device: str | None = None,
    **changes: Any,
) -> UpdateInfo:
    """Fine-tune the TinyLM on private rows, and write the update.

    Args:
        data: JSON lines with the task's columns.
        folder: of `fetch_root`.
        device: none: a GPU where there is one.
        changes: to the settings that the service recommends (`FineTuneSettings`), such as `steps=200`, or
            `mechanism={"name": "dp_sgd", "epsilon": 1.0}`.

    Stopped, it goes on where it was when it is called again in the same way.

    Raises:
        UserError: data, root or settings are not usable.
    """
    import torch

    from gt_ray.learning.engine import Engine
    from gt_ray.learning.mechanisms import statement
    from gt_ray.learning.resume import Resume
    from gt_ray.learning.samples import TrainingSet, encode
    from gt_ray.pairs.models import load_model, load_tokenizer
    from gt_ray.tasks import TASKS
    from gt_ray.tasks.data import fingerprint, read_jsonl

    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    service, root = _service(folder), Root.load(folder / ROOT)
    settings = _settings(service["checkpoint"], changes)
    rows = read_jsonl(data, task)
    samples = encode(load_tokenizer(root.base_model), TASKS[task], rows, settings.max_length, str(data))
    n_held_out = settings.stop.held_out if settings.stop.when == "plateau" else 0
    if len(samples) <= n_held_out:
        raise UserError(f"{data} has {len(samples)} rows; {n_held_out} are held out, to see when to stop")
    mechanism = statement(settings, len(samples) - n_held_out)
    by_content = sorted(
        rows, key=lambda row: json.dumps(row, sort_keys=True)
    )  # in another order they are the same rows
    own = {"rows": fingerprint(task, by_content), "root": root.hash, "seed": seed, **settings.model_dump(mode="json")}
    identity = unit_key(own)
    resume = Resume(out.with_name(f".{out.name}.progress"), identity, secrets.randbits(62))
    one = TrainingSet(samples[n_held_out:], seed, samples[:n_held_out], str(data), resume.noise_seed)
    model = ModelSettings(
        model=root.base_model, lora=LoraSettings(), dtype=service["checkpoint"]["tinylm"]["dtype"], fine_tune=settings
    )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(load_model(model, device), root, adapters_at_once=1)
    ledger = Ledger(folder)
    if resume.steps:
        say(f"fine-tune: goes on after step {resume.steps}")
    else:
        ledger.begin(own["rows"], identity, mechanism)
    with bar("fine-tune", settings.steps) as progress:
        progress.skip(resume.steps)
        ((_, result),) = engine.fine_tune([one], settings, on_step=progress.advance, resume=resume)
    if isinstance(result, UserError):
        raise result
    info = UpdateInfo(settings.model_dump(mode="json", exclude={"mechanism"}), len(one.samples), mechanism)
    write_update(out, result.snapshots_JLd[-1], root, info)
    ledger.finish(identity, hashlib.sha256(out.read_bytes()).hexdigest())
    resume.done()
    say(f"fine-tune: {len(rows)} rows, loss {result.losses[0]:.3f} to {result.losses[-1]:.3f}; update in {out}")
    say(f"learning mechanism: {info.privacy}" + (f"; {spent}" if (spent := ledger.spent(own["rows"])) else ""))
    return info


def send(
    updates: Sequence[Path],
    out: Path = Path("adapter"),
    folder: Path = ROOT_FOLDER,
    pooling: Pooling = "mean",
    base_model: str | None = None,
) -> Adapter:
    """Send update files, and write the LLM adapter that comes back as a PEFT folder.

    Args:
        folder: of `fetch_root`.
        pooling: of several updates.
        base_model: where PEFT and vLLM find the LLM here.

    Raises:
        UserError: an update is not usable, or the service refuses; nothing is written then.
    """
    contents, service = leaving(updates, folder), _service(folder)
    content, estimate = Endpoint(service["url"]).generate(contents, pooling, service["checkpoint"]["name"])
    return received(content, estimate, out, folder, base_model)


def leaving(updates: Sequence[Path], folder: Path = ROOT_FOLDER) -> list[bytes]:
    """Check update files, and say what leaves this machine with them; their contents.

    Raises:
        UserError: there is none, or one is not usable.
    """
    if not updates:
        raise UserError("no update file given")
    url, root = _service(folder)["url"], Root.load(folder / ROOT)
    contents, ledger = [], Ledger(folder)
    say(f"This leaves the machine for {url}:")
    for path in updates:
        update_Ld, info = read_update(path, root)
        contents.append(path.read_bytes())
        sha256 = hashlib.sha256(contents[-1]).hexdigest()
        spent = ledger.spent(data) if (data := ledger.data_of(sha256)) else ""
        say(
            f"  {path.name}: {len(contents[-1]):,} bytes, SHA-256 {sha256}\n"
            f"    {len(root.layout.flat(update_Ld)):,} numbers, the change of {len(root.initial)} tensors of "
            f"{root.public_name}; no row of data is in it\n"
            f"    learning mechanism: {info.privacy}{'' if 'epsilon' in info.mechanism else '; no privacy guarantee'}"
            f"{'; ' * bool(spent)}{spent}\n"
            f"    said beside it: {info.samples} rows, settings of the fine-tune {json.dumps(info.fine_tune)}"
        )
    return contents


def received(
    content: bytes, estimate: dict[str, Any], out: Path, folder: Path = ROOT_FOLDER, base_model: str | None = None
) -> Adapter:
    """Write a zipped adapter as a PEFT folder, and say what is known of it."""
    name = str(_service(folder)["checkpoint"]["llm"]["model"])
    if base_model is None and name.startswith(EMBEDDED_PREFIX):
        base_model = str(resolve(name))
    adapter = unpack(content, out, base_model)
    say(f"adapter of {adapter.base_model} in {out}; its README.md says how it was made")
    if estimate.get("out_of_range"):
        say("OUT OF RANGE: these updates are further from the service's shadows than any that was validated; test it")
    return adapter


def endpoint_of(folder: Path = ROOT_FOLDER) -> tuple[Endpoint, str]:
    """The service that a root was fetched from, and its checkpoint."""
    service = _service(folder)
    return Endpoint(service["url"]), str(service["checkpoint"]["name"])


def _service(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / SERVICE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no root; fetch it first: gt-ray client root <address>") from error
    return found


def _settings(checkpoint: dict[str, Any], changes: dict[str, Any]) -> FineTuneSettings:
    from pydantic import ValidationError

    recommended, private = checkpoint["fine_tune"], checkpoint.get("private_fine_tune")
    mechanism = changes.get("mechanism")
    if private and isinstance(mechanism, dict) and mechanism.get("name") == "dp_sgd":
        recommended, changes = private, changes | {"mechanism": private["mechanism"] | mechanism}
    try:
        return FineTuneSettings.model_validate(recommended | changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"fine-tune setting {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
