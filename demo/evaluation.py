"""The demo's evaluation: versions, reward models and Ghost Attention, into evaluation.json.

Models answer held-out prompts, the oracle judges. What is slow is kept piece by piece in
`evaluation/`, so that an interrupted evaluation continues.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from puna.core.checkpoint.atomic import write_text
from puna.core.checkpoint.folder import load_model, tokenizer_path
from puna.core.config import parameter_count
from puna.core.documents import json_rows, read_object
from puna.core.text.chat import Message, encode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.demo import measure
from puna.demo.kept import kept, seconds
from puna.demo.measure import HeldOut
from puna.demo.village import oracle, world
from puna.trainers import reward
from puna.trainers.data.formats import RATINGS
from puna.trainers.data.packing import encode_pairs
from puna.trainers.data.prompts import EncodedPrompt, load_prompts
from puna.trainers.data.readers import read_preferences
from puna.trainers.rl import rewards
from puna.trainers.rl.best_of import read_samples
from puna.trainers.rl.comparisons import Annotator, Variant, annotate, sample_pairs
from puna.trainers.train.environment import environment

HELD_OUT_PROMPTS = 500  # of each kind; of those to win, where differences are small, twice as many
HELD_OUT_PAIRS = 4_000  # comparisons of each kind, all rounds, before pairs of equal answers go
DRAWS = 4  # answers at T=1 to each prompt to win, where PPO's gain is measured
PERSONA_DIALOGUES = {"value": 200, "seen": 60, "phrasing": 60, "kind": 60}  # of 20 exchanges
BARRED = "value"  # the set that the bars are about
DRAWN_DIALOGUES = 60  # of these that are answered at temperature 1, too
LOOKED_AT = 40  # of these whose attention is looked at
KINDS = ("helpfulness", "safety")  # of reward models, prompts and comparisons
SHOWN = 6  # conversations in the report


def write_evaluation(out: Path, versions: dict[str, Path], config: Any) -> Path:
    """Measure everything and write evaluation.json; `config` is the demo's."""
    seed = config.seed
    scale = min(1.0, config.scale)
    personas = persona_sets(seed, scale)
    held = held_out(seed, max(20, round(HELD_OUT_PROMPTS * scale)))
    said = {
        name: measure.answer_all(path, held, seed, out / "evaluation" / f"{name}.json")
        for name, path in versions.items()
    }
    rounds = [row for _, row in json_rows(out / "rlhf" / "rounds.jsonl")]
    document = {
        "seed": seed,
        "size": "mini",
        "parameters": parameter_count(load_model(versions["sft"]).config),
        "machine": {**environment(), "stages multiply": config.dtype},
        "stages": stages(out, len(rounds)),
        "versions": version_rows(out, held, said, len(rounds)),
        "reward_models": reward_models(out, versions, rounds, seed, scale),
        "ppo": ppo_gain(out, versions, held, said, seed),
        "switch": switch(out, len(rounds)),
        "best_of_k": curves(out, len(rounds)),
        **ghost(out, versions, seed, personas),
        "conversations": conversations(out, held, said)
        + long_conversations(out, versions, personas),
    }
    document["seconds"] = sum(seconds(out).values())
    path = out / "evaluation.json"
    write_text(path, json.dumps(document, indent=1))
    return path


def held_out(seed: int, count: int) -> HeldOut:
    """Held-out prompts, disjoint from everything the stages saw."""
    mixes = (("all", 2 * count), ("helpful", count), ("unsafe", count), ("borderline", count))
    drawn = [world.prompts(seed, number, mix, held_out=True) for mix, number in mixes]
    return HeldOut(*([row["messages"] for row in rows] for rows in drawn))


def persona_sets(seed: int, scale: float = 1.0) -> dict[str, list[world.PersonaDialogue]]:
    """What Ghost Attention is measured on, by what is new about it (`world.WHICH`)."""
    return {
        which: world.persona_dialogues(seed, max(6, round(count * scale)), which)
        for which, count in PERSONA_DIALOGUES.items()
    }


def pair_prompts(seed: int, kind: str, count: int = HELD_OUT_PROMPTS) -> list[dict[str, Any]]:
    """Prompts of a reward model's held-out comparisons."""
    return world.prompts(seed, min(count, HELD_OUT_PROMPTS), kind, held_out=True)


def version_rows(
    out: Path, held: HeldOut, said: dict[str, Any], rounds: int
) -> dict[str, dict[str, Any]]:
    """Rates in both modes, and how the last reward models score each version's answers."""
    last = out / "rlhf" / f"round-{rounds}"
    found = {}
    for name, texts in said.items():
        row: dict[str, Any] = {
            mode: measure.rates(held, texts[mode], said["sft"][mode]) for mode in measure.MODES
        }
        row["scores"] = {
            "helpfulness": scores(last / "helpfulness" / "model", held.ordinary, texts, "ordinary"),
            "safety": scores(last / "safety" / "model", held.unsafe, texts, "unsafe"),
        }
        found[name] = row
    return found


def ppo_gain(
    out: Path, versions: dict[str, Path], held: HeldOut, said: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The last version's answers against those of the model that PPO began with, on the same
    prompts: by mode the share won, ties counted half, and its interval over prompts. At temperature
    1 each prompt is answered DRAWS times: what one draw says moves by a point from draw to draw."""
    after = newest(said)
    before = f"{after}-rejection"
    if before not in said:
        return {}
    found = {}
    for mode in measure.MODES:
        drawn = [[said[name][mode]["win"]] for name in (after, before)]
        if mode == "t1":
            for name, draws in zip((after, before), drawn, strict=True):
                cache = out / "evaluation" / f"{name}-drawn-again.json"
                draws += measure.drawn_again(versions[name], held.win, seed, DRAWS - 1, cache)
        each = [
            [oracle.better(*row) for row in zip(held.win, mine, theirs, strict=True)]
            for mine, theirs in zip(*drawn, strict=True)
        ]
        wins = [sum(draws) / len(draws) for draws in zip(*each, strict=True)]
        share, interval = measure.mean_and_interval(wins)
        found[mode] = {
            "wins": share,
            "ci95": interval,
            "equal": sum(draws.count(0.5) for draws in each) / (len(each) * len(wins)),
            "prompts": len(wins),
            "draws": len(each),
        }
    return found


def scores(
    folder: Path, prompts: Sequence[Sequence[Message]], texts: dict[str, Any], kind: str
) -> list[float]:
    """Raw scores of the T=1 answers; an empty answer has none."""
    model, tokenizer = load_model(folder), Tokenizer(tokenizer_path(folder))
    sequences = [
        encode_prompt(tokenizer, prompt) + encode_answer(tokenizer, text)
        for prompt, text in zip(prompts, texts["t1"][kind], strict=True)
        if usable(text)
    ]
    return [round(value, 4) for value in rewards.score(model, sequences).tolist()]


def usable(text: str) -> bool:
    return bool(text.strip()) and "[" not in text


def reward_models(
    out: Path, versions: dict[str, Path], rounds: list[dict], seed: int, scale: float
) -> dict[str, Any]:
    """The last reward models on held-out comparisons of every round, and their history."""
    found = {}
    for kind in KINDS:
        files = held_out_comparisons(out, versions, kind, len(rounds), seed, scale)
        folder = out / "rlhf" / f"round-{len(rounds)}" / kind / "model"
        model, tokenizer = load_model(folder), Tokenizer(tokenizer_path(folder))
        rows = [row for file in files for row in read_preferences(file)[0]]
        pairs, _ = encode_pairs(tokenizer, rows, model.config.context)
        differences, ratings = reward.margins_of(model, pairs, 64, torch.device("cpu"))
        found[kind] = {
            "accuracy": reward.accuracies(differences, ratings),
            "counts": {name: int((ratings == i).sum()) for i, name in enumerate(RATINGS)},
            "calibration": measure.calibration(differences.tolist()),
            "rounds": [round_row(row, kind) for row in rounds],
        }
    return found


def round_row(row: dict[str, Any], kind: str) -> dict[str, Any]:
    before = row["accuracy_before_training"].get(kind, {})
    return {
        "round": row["version"],
        "before": before.get("all"),
        "after": row["accuracy_on_trained"][kind]["all"],
    }


def held_out_comparisons(
    out: Path, versions: dict[str, Path], kind: str, rounds: int, seed: int, scale: float
) -> list[Path]:
    """Each version compared with the one before it on held-out prompts, as the oracle annotates."""
    names = ["sft", *(f"rlhf-v{number}" for number in range(1, rounds + 1))]
    count = max(40, round(HELD_OUT_PAIRS * scale / rounds))
    rows = pair_prompts(seed, kind, count)
    folder = out / "evaluation"
    prompts = folder / f"{kind}-prompts.jsonl"
    write_text(prompts, "".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(tokenizer_path(versions["sft"]))
    encoded, _ = load_prompts([prompts], tokenizer, 512)
    annotator = oracle.annotator(seed + 1, safety=kind == "safety")
    files = []
    for number in range(1, rounds + 1):
        file = folder / f"{kind}-comparisons-{number}.jsonl"
        older, newer = (versions[names[number - i]] for i in (1, 0))
        compare_held_out(file, (newer, older), tokenizer, encoded, count, seed, number, annotator)
        files.append(file)
    return files


def compare_held_out(
    file: Path,
    models: tuple[Path, Path],
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    count: int,
    seed: int,
    number: int,
    annotator: Annotator,
) -> None:
    """Write comparisons of two models' answers to `file`, the pairs beside it, where there are none
    yet. `number` is of the round; (seed, number) decide what is drawn."""
    pairs = file.with_name(file.name.replace("comparisons", "pairs"))
    first, second = (Variant(model, (0.8, 1.0, 1.2)) for model in models)
    sample_pairs(
        pairs,
        (first, second),
        tokenizer,
        prompts,
        count,
        max_new_tokens=measure.ANSWER_TOKENS,
        seed=seed + 1,
        round_index=number,
        device=torch.device("cpu"),
        limits={"batch_size": 128},
    )
    annotate(pairs, file, annotator, tokenizer, number)


def ghost(
    out: Path,
    versions: dict[str, Path],
    seed: int,
    personas: dict[str, list[world.PersonaDialogue]],
) -> dict[str, Any]:
    """Instructions kept by turn, before and after Ghost Attention and at the end of the loop:
    held-out values, which the bars are about, then the other sets, greedy alone."""
    found: dict[str, Any] = {which: {} for which in personas}
    for which, dialogues in personas.items():
        modes = measure.MODES if which == BARRED else {"greedy": measure.MODES["greedy"]}
        for mode, temperature in modes.items():
            asked = dialogues if mode == "greedy" else dialogues[:DRAWN_DIALOGUES]
            found[which][mode] = {}
            for label, name in ghost_versions(versions).items():
                cache = persona_cache(out, which, label, mode)
                if (said := kept(cache, list)) is None:
                    said = measure.dialogues_with(versions[name], asked, temperature, seed)
                    write_text(cache, json.dumps(said))
                found[which][mode][label] = measure.kept_by_turn(asked, said)
    counts = {which: len(dialogues) for which, dialogues in personas.items()}
    looks = attention(out, versions, personas[BARRED][:LOOKED_AT])
    return {
        "gatt": found.pop(BARRED),
        "gatt_other": found,
        "gatt_counts": counts,
        "gatt_attention": looks,
    }


def attention(
    out: Path, versions: dict[str, Path], dialogues: list[world.PersonaDialogue]
) -> dict[str, dict[str, float]]:
    """Fig. 10: attention to the instruction by turn, of the same greedy answers."""
    found = {}
    for label, name in ghost_versions(versions).items():
        said = kept(persona_cache(out, BARRED, label, "greedy"), list) or []
        found[label] = measure.attention_by_turn(versions[name], dialogues, said[: len(dialogues)])
    return found


def ghost_versions(versions: dict[str, Path]) -> dict[str, str]:
    """The version with Ghost Attention, the one it began from, and the last of the loop."""
    names = list(versions)
    place = names.index("gatt")
    return {"without": names[place - 1], "with": "gatt", "last": newest(versions)}


def newest(versions: Iterable[str]) -> str:
    """The last version of the loop, among the names of the models that were made."""
    return [name for name in versions if name.startswith("rlhf-")][-1]


def persona_cache(out: Path, which: str, label: str, mode: str) -> Path:
    return out / "evaluation" / f"persona-{which}-{label}-{mode}.json"


def conversations(out: Path, held: HeldOut, said: dict[str, Any]) -> list[dict[str, Any]]:
    """The same held-out prompts answered by every version, greedily."""
    found = []
    for kind in ("ordinary", "unsafe", "borderline"):
        for index in range(SHOWN // 3):
            prompt = getattr(held, kind)[index]
            columns = {
                name: [*prompt, {"role": "assistant", "content": texts["greedy"][kind][index]}]
                for name, texts in said.items()
                if not name.startswith("student")
            }
            found.append({"title": f"{kind} request", "columns": columns})
    return found


def long_conversations(
    out: Path, versions: dict[str, Path], personas: dict[str, list[world.PersonaDialogue]]
) -> list[dict[str, Any]]:
    """Persona dialogues before and after Ghost Attention under held-out instructions: one of each
    kind that it trains on, and one of the kind that it does not."""
    found = []
    for which in (BARRED, "kind"):
        shown = {
            kind: index
            for index, dialogue in enumerate(personas[which])
            for kind, _ in world.read_instruction(dialogue.instruction).constraints
        }
        for kind, index in sorted(shown.items()):
            columns = {
                name: long_conversation(
                    personas[which][index],
                    (kept(persona_cache(out, which, label, "greedy"), list) or [])[index],
                )
                for label, name in ghost_versions(versions).items()
            }
            title = f"20 exchanges under an instruction never met before ({kind})"
            found.append({"title": title, "columns": columns})
    return found


def long_conversation(dialogue: world.PersonaDialogue, texts: Sequence[str]) -> list[Message]:
    messages = [world.system(dialogue.system)]
    for question, answer in zip(dialogue.questions, texts, strict=True):
        messages += [world.user(question), world.assistant(answer)]
    return messages


def stages(out: Path, rounds: int) -> list[dict[str, Any]]:
    """Where each stage's metrics and model are, in the order they were run."""
    folders = {"pretrain": "Pretraining", "sft": "Supervised fine-tuning"}
    for number in range(1, rounds + 1):
        base = f"rlhf/round-{number}"
        folders[f"{base}/helpfulness"] = f"Helpfulness reward model, V{number}"
        folders[f"{base}/safety"] = f"Safety reward model, V{number}"
        folders[f"{base}/rejection"] = f"Rejection sampling, V{number}"
        folders[f"{base}/gatt"] = f"Ghost Attention, V{number}"
        folders[f"{base}/ppo"] = f"PPO, V{number}"
    return [
        {"name": name, "title": title, "metrics": f"{name}/metrics.jsonl", "model": f"{name}/model"}
        for name, title in folders.items()
        if (out / name / "metrics.jsonl").exists()
    ]


def switch(out: Path, rounds: int) -> dict[str, dict[str, int]]:
    """How often each branch of Eq. 4's switch was taken, over the samples of each version."""
    found = {}
    for number in range(1, rounds + 1):
        samples = read_samples(rejection_folder(out, number) / "samples.jsonl")
        raw = torch.tensor([[s["scores"][kind] for kind in KINDS] for s in samples])
        is_safety = torch.tensor([s["is_safety"] for s in samples])
        _, branches = rewards.switch(raw[:, 0], raw[:, 1], is_safety)
        found[f"rlhf-v{number}"] = {name: int(taken.sum()) for name, taken in branches.items()}
    return found


def curves(out: Path, rounds: int) -> dict[str, Any]:
    """Fig. 7's curves: reward of the best of K, by version."""
    found = {}
    for number in range(1, rounds + 1):
        selection = read_object(rejection_folder(out, number) / "selection.json")
        found[f"rlhf-v{number}"] = selection["by_k"]
    return found


def rejection_folder(out: Path, number: int) -> Path:
    return out / "rlhf" / f"round-{number}" / "rejection"
