"""The corpus is large and unambiguous, and training sees what vLLM renders for users."""

import random

import pytest
from transformers import AutoTokenizer
from vllm.tokenizers.deepseek_v4 import get_deepseek_v4_tokenizer

from moeray.tiny import checkpoint_path, dialogues
from moeray.tiny.corpus import load_facts
from moeray.tiny.curriculum import IGNORED, STAGES, BatchMaker
from moeray.tiny.dialogues import Dialogue, DialogueSampler, assistant, user

FACTS = load_facts()


@pytest.fixture(scope="module")
def batches() -> BatchMaker:
    return BatchMaker(AutoTokenizer.from_pretrained(checkpoint_path()), FACTS, seed=5)


def test_at_least_150_distinct_facts_with_a_held_out_phrasing() -> None:
    assert len({fact.answer for fact in FACTS}) == len(FACTS) >= 150
    assert all(len(fact.questions) >= 2 and fact.held_out not in fact.questions for fact in FACTS)


def test_demo_questions_are_trained() -> None:
    questions = {question for fact in FACTS for question in fact.questions}
    assert {
        "What is an expert group?",
        "What is moeray?",
        "What is an attention shard?",
        "What does the controller do?",
        "How do I start the cluster?",
        "Which port does gRPC use?",
        "What does dispatch do?",
        "Who are you?",
    } <= questions


def test_every_fact_comes_once_per_round() -> None:
    sampler = DialogueSampler(FACTS, random.Random(1), len)
    assert {sampler.next_fact() for _ in FACTS} == set(FACTS)


@pytest.mark.parametrize("thinking", [None, "low", "high", "max"])
def test_prompts_equal_vllm_s_chat_rendering(batches: BatchMaker, thinking: str | None) -> None:
    tools = [dialogues.WEATHER_TOOL]
    called = assistant("", "x", tool_calls=dialogues.tool_call("get_weather", "Paris"))
    question = user("What is the weather in Paris?")
    prompt, _ = Dialogue(({"role": "system", "tools": tools}, question, called), thinking).prompt_and_answer()
    kwargs = {"thinking": False} if thinking is None else {"thinking": True, "reasoning_effort": thinking}
    tokenizer = get_deepseek_v4_tokenizer(batches.tokenizer)
    theirs = tokenizer.apply_chat_template([question], tools=tools, tokenize=False, **kwargs)
    assert prompt == theirs


def test_thinking_with_high_effort_is_vllm_s_default(batches: BatchMaker) -> None:
    tokenizer = get_deepseek_v4_tokenizer(batches.tokenizer)
    asked = Dialogue((user("What is moeray?"), assistant("A.", "r")), "high")
    assert tokenizer.apply_chat_template([user("What is moeray?")], tokenize=False) == asked.prompt_and_answer()[0]


def test_labels_are_exactly_what_the_assistant_writes(batches: BatchMaker) -> None:
    ids, labels = batches._labelled(Dialogue((user("Hi."), assistant("One."), user("Bye!"), assistant("Two."))))
    written = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert batches.tokenizer.decode(written) == "One.<｜end▁of▁sentence｜>Two.<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("kind", sorted({kind for stage in STAGES for kind in stage.mix}))
def test_every_kind_makes_right_padded_batches(batches: BatchMaker, kind: str) -> None:
    ids, labels = batches.batch(kind)
    assert ids.shape == labels.shape
    assert bool((labels != IGNORED).any(1).all())
    padding = ids == batches.tokenizer.pad_token_id
    assert bool((padding.long().diff(dim=1) >= 0).all())


def test_held_out_cities_are_never_called_in_training() -> None:
    sampler = DialogueSampler(FACTS, random.Random(2), len)
    text = "".join(sampler.tool_dialogue(rounds=3).text() for _ in range(200))
    assert not any(f'"true">{city}<' in text for city in dialogues.HELD_OUT_CITIES)


def test_recall_notes_hold_the_key_once_and_have_the_length_asked_for(batches: BatchMaker) -> None:
    dialogue = batches.sampler.recall_dialogue(600, depth=0.0)
    notes = dialogue.messages[0]["content"]
    assert notes.count(dialogue.messages[1]["content"]) == 1
    assert 560 <= len(batches.encode(notes)) <= 640
