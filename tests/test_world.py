"""The demo's world: drawn from a seed, held-out apart, small enough to be learned."""

import random
from collections import Counter
from itertools import chain

import pytest

from puna.core.text.chat import TAGS, check_dialogue, encode_dialogue
from puna.core.text.tokenizer import train_tokenizer
from puna.demo.village import vocabulary as v
from puna.demo.village import world
from puna.demo.village.personas import (
    CHOICES,
    GHOST_KINDS,
    KINDS,
    Instruction,
    draw_instruction,
    instruction_text,
    read_instruction,
    translate,
)
from puna.demo.village.tasks import JOB_PAIRS, draw_task, read_question


def questions_of(rows):
    return {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(world.tokenizer_texts(0, 6000), path, vocab_size=1280)


def test_same_seed_same_rows_and_other_seed_other_rows():
    makers = (
        lambda seed: list(world.pretraining(seed, 50)),
        lambda seed: list(world.demonstrations(seed, 50)),
        lambda seed: world.prompts(seed, 50),
        lambda seed: world.persona_dialogues(seed, 5),
    )
    for make in makers:
        assert make(3) == make(3)
        assert make(3) != make(4)


def test_every_demonstration_is_a_dialogue_of_this_world():
    for row in world.demonstrations(1, 400):
        messages = row["messages"]
        check_dialogue(messages)
        assert messages[-1]["role"] == "assistant"
        for message in messages:
            if message["role"] == "system":
                read_instruction(message["content"])
            if message["role"] == "user":
                assert not read_question(message["content"]).held_out


def test_text_never_contains_chat_tags():
    text = " ".join(row["text"] for row in world.pretraining(5, 2000))
    assert not any(tag in text for tag in TAGS)


def test_personas_occur_only_in_dialogues_of_one_or_two_exchanges():
    turns = Counter()
    for row in world.demonstrations(2, 1000):
        messages = row["messages"]
        told = messages[0]["role"] == "system"
        turns[told, (len(messages) - told) // 2] += 1
    assert {count for told, count in turns if told} == {1, 2}
    assert max(count for told, count in turns if not told) > 15


def test_held_out_prompts_are_apart_from_all_training_data():
    held = questions_of(world.prompts(0, 500, "all", held_out=True))
    held = {text for text in held if read_question(text).kind != "self"}
    trained = questions_of(chain(world.prompts(1, 2000, "all"), world.demonstrations(0, 2000)))
    assert not held & trained
    pretrained = " ".join(row["text"] for row in world.pretraining(0, 5000))
    assert not any(text in pretrained for text in held)


def test_held_out_jobs_are_unseen_pairs_of_verb_and_noun():
    rng = random.Random(0)
    held = {draw_task(rng, "unsafe", held_out=True).act.split()[0] for _ in range(300)}
    assert len(held) > 8
    pretrained = " ".join(row["text"] for row in world.pretraining(0, 5000))
    for _ in range(100):
        act = draw_task(rng, "borderline", held_out=True).act
        assert act not in pretrained


@pytest.mark.parametrize("mix", ["helpful", "borderline", "unsafe", "all", "safety"])
def test_there_are_500_different_held_out_prompts_of_each_mix(mix):
    rows = world.prompts(0, 500, mix, held_out=True)
    texts = {tuple(m["content"] for m in row["messages"]) for row in rows}
    assert len(texts) == 500


def test_only_unsafe_prompts_carry_the_tag():
    for row in world.prompts(0, 400, "all"):
        nature = read_question(row["messages"][-1]["content"]).nature
        assert row["safety"] == (nature == "unsafe")


@pytest.mark.parametrize("mix", ["all", "safety", "helpfulness"])
def test_mixes_follow_their_weights(mix):
    rows = world.prompts(0, 600, mix)
    natures = Counter(read_question(row["messages"][-1]["content"]).nature for row in rows)
    weights = world.MIXES[mix]
    for nature, weight in (("borderline", weights[2]), ("unsafe", weights[3])):
        # Prompts are all different, so a small family falls a little short of its weight.
        assert abs(natures[nature] / 600 - weight / sum(weights)) < 0.06


def test_unknown_mix_and_too_many_prompts_are_refused():
    with pytest.raises(ValueError, match="unknown prompt mix 'odd'; choose one of"):
        world.prompts(0, 5, "odd")
    with pytest.raises(ValueError, match="ask for at most that many"):
        world.prompts(0, 5000, "borderline", held_out=True)


def test_measured_turns_can_show_the_instruction():
    from puna.demo.village import oracle

    for which, new in world.WHICH.items():
        counts, kinds = Counter(), Counter()
        for dialogue in world.persona_dialogues(0, 60, which):
            assert len(dialogue.questions) == 20
            assert dialogue.system in (dialogue.instruction, dialogue.short)
            who = read_instruction(dialogue.instruction)
            assert read_instruction(dialogue.short) == who
            counts[len(who.constraints)] += 1
            kinds.update(kind for kind, _ in who.constraints)
            for turn in world.MEASURED_TURNS:
                assert oracle.tests(dialogue.instruction, dialogue.questions[turn - 1])
        assert set(kinds) == set(new.kinds)
        assert set(counts) == set(range(1, len(new.kinds) + 1))
    assert set(GHOST_KINDS) < set(KINDS)


def test_there_are_hundreds_of_values_of_each_kind_and_a_part_of_them_is_held_out():
    for kind, sides in CHOICES.items():
        assert len(sides[False]) > 150 and len(sides[True]) > 30, kind
        # Every part of a held-out value is known from values of training.
        parts = [set(word for value in sides[side] for word in value.split()) for side in sides]
        assert parts[True] <= parts[False], kind


def test_words_are_one_piece_each_and_texts_short(tokenizer):
    words = Counter(
        word.strip(".,?!:") for row in world.pretraining(7, 5000) for word in row["text"].split()
    )
    assert len({word.lower() for word in words}) < 520
    split = sum(count for word, count in words.items() if len(tokenizer.encode(word)) > 1)
    assert split < 0.03 * words.total()
    rows = [row["messages"] for row in world.demonstrations(0, 200)]
    lengths = [len(encode_dialogue(tokenizer, messages)[0]) for messages in rows]
    assert max(lengths) <= 1024
    assert 40 < sum(lengths) / len(lengths) < 90


def test_twenty_exchanges_fit_with_the_instruction_in_each(tokenizer):
    for seed in (0, 1, 2):
        dialogues = world.persona_dialogues(seed, 200)
        lengths = world.fits(lambda messages: encode_dialogue(tokenizer, messages)[0], dialogues)
        assert max(lengths) <= 1024


def test_tools_are_nobodys_object_and_natures_are_known():
    nouns = {noun for job in v.JOBS.values() for noun in job.fine + job.wrong}
    assert not nouns & set(v.TOOLS)
    assert len(set(v.TOOLS)) == len(v.JOBS)
    assert {nature: len(pairs) > 50 for nature, pairs in JOB_PAIRS.items()} == dict.fromkeys(
        JOB_PAIRS, True
    )


def test_language_words_are_foreign():
    english = v.SMALL_OF_THINGS | v.SMALL_OF_DOING
    foreign = {*v.STEMS, *v.ENDINGS}
    assert not v.SMALL_OF_THINGS & v.SMALL_OF_DOING
    assert len(foreign) == len(v.STEMS) + len(v.ENDINGS) and not foreign & english
    plain = "You need a broom to sweep the floor."
    said = translate(plain, Instruction(language="ba ki"))
    assert said == "ba ki ba broom ki sweep ba floor."
    assert not foreign & set(plain.lower().split())


def test_instructions_read_back():
    rng = random.Random(1)
    for held_out in (False, True):
        for short in (False, True):
            for _ in range(100):
                who = draw_instruction(rng, held_out=held_out)
                assert read_instruction(instruction_text(who, short=short)) == who
                told = instruction_text(who, rng, short=short, held_out=held_out)
                assert read_instruction(told) == who
    for text in ("Be nice.", "You enjoy painting jam. Be nice.", "Hobby: painting jam. Enjoy x."):
        with pytest.raises(ValueError, match="not an instruction"):
            read_instruction(text)
    with pytest.raises(ValueError, match="not an instruction"):  # two hobbies
        read_instruction("You enjoy painting jam. Hobby: packing hay.")
