"""Packed conversations against transformers' own apply_chat_template, on templates of several kinds."""

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import transformers
from conftest import pack_inline, source_texts
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from scorer.chat_marks import marks_within
from scorer.config import PackConfig
from shards import ShardFolder
from shards.verify import verify_folder

SPECIAL = ["<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor -%}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}"
    "{%- endfor %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] | trim + ' ' }}{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
    "{% else %}{{ raise_exception('only user and assistant, not ' + message['role']) }}{% endif %}{% endfor %}"
)
BARE = (  # the mark has the content alone, without what ends it
    "{% for m in messages %}{{ m.role | upper }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
SYSTEM_LAST = (  # in another order, and cut
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{% if m.role == 'assistant' -%}"
    "{%- generation -%} {{ m.content.split('</think>')[-1].strip() }}{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages if m.role == 'system' %}#{{ m.content }}{% endfor %}{{ eos_token }}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "bare": BARE, "system last": SYSTEM_LAST}
WORDS = [
    "",
    " ",
    "a",
    "two  spaces ",
    "naïve café",
    "日本語のテキスト",
    "😀👨‍👩‍👧",
    "line\nline\n\n",
    "<eos>",
    "x" * 300,
    "</think> so ",
    "\t",
]


def tokenizer(folder: Path, kind: str = "plain", template: Any = None) -> Path:
    """kind: plain byte-level; trim: whose offsets leave spaces out, as of Llama 3; pieces: SentencePiece's way, with BOS."""
    if kind == "pieces":
        built = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = []
    else:
        built = Tokenizer(models.BPE())
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        special, alphabet = SPECIAL, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(source_texts(60) + WORDS, trainer)
    bos = built.token_to_id("<bos>")
    begin = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    if kind == "trim":
        built.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    if kind == "pieces":
        built.post_processor = begin
    names = {"eos_token": "<eos>", "bos_token": "<bos>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=built, **names)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def conversations() -> list[dict[str, Any]]:
    """Of one to five turns, with and without a system prompt, of odd contents."""
    found: list[dict[str, Any]] = []
    contents = itertools.cycle(WORDS)
    for turns, system in itertools.product(range(1, 6), (False, True)):
        for _ in range(4):
            messages = [{"role": "system", "content": next(contents)}] if system else []
            messages += [{"role": ("user", "assistant")[turn % 2], "content": next(contents)} for turn in range(turns)]
            found.append({"messages": messages})
    return found


def write(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def pack(corpus: Path, tokens: Path, out: Path, **settings: Any) -> ShardFolder:
    defaults = {"seq_len": 64, "tokens_per_shard": 64 * 8, "messages_field": "messages"}
    folder = pack_inline(PackConfig([str(corpus)], str(tokens), str(out), **(defaults | settings)))
    assert not verify_folder(folder).problems
    return folder


def documents_of(folder: ShardFolder) -> dict[int, tuple[list[int], list[int]]]:
    """Ids and mask of each document, put together from its pieces, without the BOS that a piece got."""
    bos = folder.manifest.tokenizer["bos_token_id"]
    found: dict[int, tuple[list[int], list[int]]] = {}
    for row in pyarrow.dataset.dataset(folder.path, format="arrow").to_table().to_pylist():
        predict = row.get("predict", [True] * len(row["input_ids"]))
        assert len(predict) == len(row["input_ids"])
        start = 0
        for document, length in zip(row["doc_ids"], row["doc_lengths"]):
            ids, mask = found.setdefault(document, ([], []))
            first = start + (bos is not None and bool(ids))
            ids += row["input_ids"][first : start + length]
            mask += map(int, predict[first : start + length])
            start += length
    return found


def expected_of(theirs: Any, document: dict[str, Any], **arguments: Any) -> tuple[list[int], list[int]]:
    out = theirs.apply_chat_template(
        document["messages"], tools=document.get("tools"), tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True, **arguments,
    )  # fmt: skip
    return out["input_ids"], out["assistant_masks"]


def with_whole_characters(theirs: Any, document: dict[str, Any], mask: list[int]) -> list[int]:
    """The mask of transformers with all tokens of a span's last character, of which it takes the first: by the offsets."""
    text = theirs.apply_chat_template(document["messages"], tools=document.get("tools"), tokenize=False)
    offsets = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    whole = list(mask)
    for token in range(1, len(whole)):
        whole[token] |= whole[token - 1] & (offsets[token][0] < offsets[token - 1][1])
    return whole


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["plain", "pieces"])
def test_ids_and_masks_are_those_of_transformers(tmp_path: Path, kind: str, name: str, packing: str) -> None:
    tokens = tokenizer(tmp_path / "tok", kind, TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(tokens)
    given = conversations()
    given = [given_ for given_ in given if name != "llama" or given_["messages"][0]["role"] != "system"]
    folder = pack(write(tmp_path / "c.jsonl", given), tokens, tmp_path / "out", train_on="assistant", packing=packing)
    found, masked, same = documents_of(folder), 0, 0
    for number, document in enumerate(given):
        ids, mask = expected_of(theirs, document)
        whole = with_whole_characters(theirs, document, mask)
        assert found[number] == (ids, whole), document
        masked, same = masked + sum(whole), same + (whole == mask)
    assert same >= 0.7 * len(given)
    assert same == len(given) or name in ("bare", "system last")  # whose marks end with the content
    assert folder.manifest.predict
    begins = name == "llama"
    assert (folder.manifest.tokenizer["bos_token_id"] is not None) == begins
    (file,) = folder.manifest.corpus
    assert file.without_eos == (sum(ids[-1] != theirs.eos_token_id for ids, _ in found.values()) or None)
    assert file.predicted_tokens == masked
    assert file.documents_packed == len(given)
    # from the tokenizer's copy in the folder too
    copy = transformers.AutoTokenizer.from_pretrained(folder.path / "_tokenizer")
    assert expected_of(copy, given[0]) == found[0]


def test_offsets_without_spaces_do_not_move_the_mask(tmp_path: Path) -> None:
    """Where a mark begins or ends in a space that no token has, transformers gives up; ours is the tokens in between."""
    tokens = tokenizer(tmp_path / "tok", "trim", LLAMA)
    theirs = transformers.AutoTokenizer.from_pretrained(tokens)
    given = [{"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "so be it"}] * 2}]
    found = documents_of(pack(write(tmp_path / "c.jsonl", given), tokens, tmp_path / "out", train_on="assistant"))
    ids, wrong = expected_of(theirs, given[0])
    assert sum(wrong) == 0
    assert found[0][0] == ids
    text = theirs.apply_chat_template(given[0]["messages"], tokenize=False)
    offsets = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = [place + len(" so be it <eos>") for place in range(len(text)) if text.startswith(" so be it <eos>", place)]
    inside = [any(end - len(" so be it <eos>") <= a and b <= end for end in ends) for a, b in offsets]
    # a token of a space alone has no characters; those between two tokens of the answer count
    assert [bool(mask) for mask in found[0][1]] == inside


@pytest.mark.parametrize("kind", ["plain", "trim", "pieces"])
def test_the_last_character_is_predicted_whole(tmp_path: Path, kind: str) -> None:
    """The tokens of an answer decode to it, also where its last character takes several of them."""
    answers = ["ok 👍", "𝒳", "naïve 龘", "so be it", "龘龘 é", "👩‍🚀"]
    turns = [[{"role": "user", "content": "ask 👍"}, {"role": "assistant", "content": answer}] for answer in answers]
    given = [{"messages": messages} for messages in turns] + [{"messages": turns[0] + turns[2]}]
    tokens = tokenizer(tmp_path / "tok", kind, BARE)
    theirs = transformers.AutoTokenizer.from_pretrained(tokens)
    found = documents_of(pack(write(tmp_path / "c.jsonl", given), tokens, tmp_path / "out", train_on="assistant"))
    told = [theirs.decode([token for token, mask in zip(*found[number]) if mask]) for number in found]
    assert [text.replace(" ", "") for text in told] == [
        answer.replace(" ", "") for answer in [*answers, answers[0] + answers[2]]
    ]
    cut = [sum(expected_of(theirs, document)[1]) < sum(found[number][1]) for number, document in enumerate(given)]
    assert cut[:4] == [True, True, True, False]


def test_tools_and_nulls_are_the_same_from_lines_and_tables(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}}}
    given = [
        {"messages": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                      {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}], "tools": [tool]},
        {"messages": [{"role": "user", "content": "and now?"}, {"role": "assistant", "content": "Nothing."}]},
    ]  # fmt: skip
    tokens = tokenizer(tmp_path / "tok", template=CHATML)
    lines = pack(write(tmp_path / "c.jsonl", given), tokens, tmp_path / "lines", train_on="assistant")
    theirs = transformers.AutoTokenizer.from_pretrained(tokens)
    assert documents_of(lines) == {number: expected_of(theirs, document) for number, document in enumerate(given)}
    pyarrow.parquet.write_table(pa.Table.from_pylist(given), tmp_path / "c.parquet")
    tables = pack(tmp_path / "c.parquet", tokens, tmp_path / "tables", train_on="assistant")
    assert documents_of(tables) == documents_of(lines)
    as_json = [{name: json.dumps(value) for name, value in document.items()} for document in given]
    pyarrow.parquet.write_table(pa.Table.from_pylist(as_json), tmp_path / "j.parquet")
    assert documents_of(pack(tmp_path / "j.parquet", tokens, tmp_path / "json", train_on="assistant")) == documents_of(
        lines
    )


def test_one_of_several_templates_and_arguments(tmp_path: Path) -> None:
    several = {"default": BARE, "tool_use": CHATML, "short": "{{ messages[0].content }}{{ mood | default('') }}"}
    tokens = tokenizer(tmp_path / "tok", template=several)
    theirs = transformers.AutoTokenizer.from_pretrained(tokens)
    given = [
        {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "so"}]} for _ in range(2)
    ]
    given[1]["tools"] = [{"name": "add"}]
    folder = pack(write(tmp_path / "c.jsonl", given), tokens, tmp_path / "a", train_on="assistant")
    assert documents_of(folder) == {number: expected_of(theirs, document) for number, document in enumerate(given)}
    own = pack(tmp_path / "c.jsonl", tokens, tmp_path / "b", chat_template="short", chat_template_args=["mood=: so so"])
    ids = theirs.apply_chat_template(given[0]["messages"], chat_template="short", mood=": so so", return_dict=False)
    assert documents_of(own)[1] == (ids, [1] * len(ids))
    assert not own.manifest.predict
    assert own.manifest.conversations["chat_template_args"] == {"mood": ": so so"}


@pytest.mark.parametrize(
    ("kind", "template", "bos", "begins"),
    [
        ("trim", LLAMA, "auto", True), ("trim", LLAMA, "always", True), ("trim", LLAMA, "never", True),
        ("trim", BARE, "auto", False), ("trim", BARE, "always", True), ("plain", LLAMA, "auto", True),
        ("plain", CHATML, "auto", False), ("plain", CHATML, "always", True),
    ],
)  # fmt: skip
def test_one_bos_and_no_eos_more(tmp_path: Path, kind: str, template: str, bos: str, begins: bool) -> None:
    tokens = tokenizer(tmp_path / "tok", kind, template)
    theirs = transformers.AutoTokenizer.from_pretrained(tokens)
    given = [{"messages": [{"role": "user", "content": "ask " * 40}, {"role": "assistant", "content": "so"}]}]
    folder = pack(write(tmp_path / "c.jsonl", given), tokens, tmp_path / "out", bos=bos, seq_len=16)
    ids = expected_of(theirs, given[0])[0]
    own = [theirs.bos_token_id] if begins and ids[0] != theirs.bos_token_id else []
    assert documents_of(folder)[0][0] == own + ids
    rows = pyarrow.dataset.dataset(folder.path, format="arrow").to_table()["input_ids"].to_pylist()
    assert len(rows) > 3
    assert all((row[0] == theirs.bos_token_id) == (begins and bos != "never") for row in rows[1:])


def test_what_cannot_be_a_conversation_is_rejected_with_its_reason(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "so"}]}
    bad = {
        '{"messages": [{"role": "narrator", "content": "x"}]}': "only user and assistant, not narrator",
        '{"messages": "no list"}': "no JSON",
        '{"messages": {"role": "user"}}': "is dict",
        '{"messages": ["text"]}': "message 0 is str",
        '{"messages": [{"from": "human", "value": "x"}]}': "message 0 has no role, only from, value",
        '{"messages": null}': "is NoneType",
        '{"text": "x"}': "has no field 'messages', only text; set --messages-field",
        '{"messages": [{"role": "user", "content": null}]}': "message 0 has null for content",
        '{"messages": [{"role": "user", "content": null, "id": 3}]}': "message 0 has null for content, only role, content, id",
        '{"messages": [{"role": "user", "text": "the question"}]}': "message 0 has no content, only role, text; expected",
        '{"messages": [{"role": "assistant"}]}': "message 0 has no content",
        '{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}': "message 0 has null for content",
        '{"messages": [{"role": "user", "content": []}]}': "message 0 has [] for content",
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}': "part of type text without a text",
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}': "as Python shows a list: [{'type'",
        '{"messages": [{"role": "user", "content": {"text": "hi"}}]}': "as Python shows a dict: {'text'",
        '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}': "has tool_calls and no content",
        '{"messages": [{"role": "user", "content": "\\ud800"}]}': "unpaired surrogate",
        '{"messages": [{"role": "user", "content": "x"}], "tools": 3}': "field 'tools' is int",
    }
    lines = [json.dumps(good), *bad, '{"messages": []}', json.dumps(good)]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("\n".join(lines), encoding="utf-8")
    tokens = tokenizer(tmp_path / "tok", template=LLAMA)
    folder = pack(corpus, tokens, tmp_path / "out", on_bad_document="reject", train_on="assistant")
    assert folder.manifest.documents == {"read": 22, "packed": 2, "empty": 1, "rejected": 19}
    reasons = [json.loads(line)["reason"] for line in (folder.path / "_rejected.jsonl").read_text().splitlines()]
    for number, (reason, expected) in enumerate(zip(reasons, bad.values(), strict=True)):
        assert reason.startswith(f"{corpus}:{number + 2}: ")
        assert expected in reason
    with pytest.raises(ValueError, match=r"c.jsonl:2: the chat template refuses it \(TemplateError: only user and"):
        pack(corpus, tokens, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()


def test_a_message_may_speak_without_content(tmp_path: Path) -> None:
    """Null is left out by a template that asks for it, and refused where one writes it as None."""
    asks = CHATML.replace("{% generation %}{{ message.content }}", "{% generation %}{{ message.content or '' }}")
    assert asks != CHATML
    turns = [
        {"tool_calls": [{"function": {"name": "f"}}]},
        {"content": None, "tool_calls": [{"function": {"name": "f"}}]},
    ]
    given = [{"messages": [{"role": "user", "content": "None of it"}, {"role": "assistant", **turn}]} for turn in turns]
    corpus, tokens = write(tmp_path / "c.jsonl", given), tokenizer(tmp_path / "tok", template=asks)
    theirs = transformers.AutoTokenizer.from_pretrained(tokens)
    found = documents_of(pack(corpus, tokens, tmp_path / "a", train_on="assistant"))
    assert found == {number: expected_of(theirs, document) for number, document in enumerate(given)}
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    given = [{"messages": [{"role": "user", "content": [{"type": "text", "text": text} for text in ("a", " b")]}]}]
    in_parts = pack(write(tmp_path / "p.jsonl", given), tokenizer(tmp_path / "parts", template=parts), tmp_path / "p")
    assert theirs.decode(documents_of(in_parts)[0][0]) == "a b"
    (tmp_path / "writes.jinja").write_text(CHATML)
    with pytest.raises(ValueError, match=r"c.jsonl:2: the chat template refuses it .*it writes None for a message"):
        pack(corpus, tokens, tmp_path / "b", chat_template=str(tmp_path / "writes.jinja"))


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (None, {}, "its tokenizer has no chat template; name one with --chat-template"),
        (CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", ""), {"train_on": "assistant"},
         r"does not mark what the assistant writes.*--chat-template FILE"),
        ("{% for %}", {}, "is not valid Jinja"),
        (CHATML, {"chat_template": "nowhere.jinja"}, "--chat-template nowhere.jinja: cannot be read"),
        ("{{ ['a', 'b'] | random }}{{ messages[0].content }}", {}, "uses the filter random, so the same corpus would give other"),
        ("{{ messages | map('random') | list }}", {}, "uses the filter random"),
        ("{{ lipsum() }}{{ messages[0].content }}", {}, "uses the function lipsum"),
        ("{# {% generation %} #}{{ messages[0].content }}", {"train_on": "assistant"}, "does not mark what the assistant writes"),
        ("{% macro turn(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}{{ turn(messages[0]) }}",
         {"train_on": "assistant"}, "inside a macro, whose .*; put the marks around the macro's call"),
        ("{{ strftime_now('%Y') }}{{ messages[0].content }}", {}, r"tok: the chat template asks for today's date.*--chat-template-date"),
    ],
)  # fmt: skip
def test_refused_before_the_folder_is_there(tmp_path: Path, template: Any, settings: dict, message: str) -> None:
    tokens = tokenizer(tmp_path / "tok", template=template)
    corpus = write(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "ask"}]}])
    with pytest.raises(ValueError, match=message):
        pack(corpus, tokens, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


MARKED = "{% generation %}{{ m.content }}{% endgeneration %}"


@pytest.mark.parametrize(
    ("within", "body"),
    [
        ("a macro", "{% macro t(m) %}<{{ m.role }}>" + MARKED + "{% endmacro %}{% for m in messages %}{{ t(m) }}{% endfor %}"),
        ("a {% set %} block", "{% for m in messages %}{% set x %}A:" + MARKED + "{% endset %}{{ x }}{% endfor %}"),
        ("a {% filter %} block", "{% for m in messages %}{% filter lower %}A:" + MARKED + "{% endfilter %}{% endfor %}"),
        ("a {% call %} block", "{% macro t() %}[{{ caller() }}]{% endmacro %}{% for m in messages %}{% call t() %}" + MARKED + "{% endcall %}{% endfor %}"),
        ("a recursive loop", "{% for m in messages recursive %}A:" + MARKED + "{% if m.more %}{{ loop(m.more) }}{% endif %}{% endfor %}"),
        ("a block that self repeats", "{% set m = messages[1] %}{% block b scoped %}A:" + MARKED + "{% endblock %}{{ self.b() }}"),
        (None, "{% macro t(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}A:{% generation %}{{ t(m) }}{% endgeneration %}{% endfor %}"),
        (None, "{% for m in messages %}{% with x = 1 %}{% block b scoped %}A:" + MARKED + "{% endblock %}{% endwith %}{% break %}{% endfor %}"),
        (None, "{% for m in messages %}{% if m.role %}A:{%+ generation -%}\n{{ m.content }}{% endgeneration %}{% else %}{% endif %}{% endfor %}"),
        (None, "{% for m in messages %}A{% generation %}{% generation %}{{ m.content }}{% endgeneration %}{% endgeneration %}{% endfor %}"),
    ],
)  # fmt: skip
def test_marks_that_transformers_would_misplace(within: str | None, body: str) -> None:
    """What it marks in the text of two turns is what they say, but where we refuse the template."""
    messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "so be it"}]
    (text,), (spans,) = render_jinja_template([messages], chat_template=body, return_assistant_tokens_mask=True)
    right = {text[start:end] for start, end in spans} <= {"ask", "so be it"}
    assert right == (within is None)
    parsed = _compile_jinja_template(body).environment.parse(body)
    assert set(marks_within(parsed)) == {within}


def test_a_day_and_a_file_for_the_template(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}|{{ messages[0].content }}", encoding="utf-8")
    tokens = tokenizer(tmp_path / "tok", template=CHATML)
    corpus = write(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "ask"}]}])
    settings = {"chat_template": str(template), "chat_template_date": "2025-01-31"}
    folder = pack(corpus, tokens, tmp_path / "out", **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(folder.path / "_tokenizer")
    assert theirs.decode(documents_of(folder)[0][0]) == "31 Jan 2025|ask"
    assert theirs.chat_template == template.read_text()
    with pytest.raises(ValueError, match=r"--chat-template-date is '2025-01-31' there, '2025-02-01' asked for"):
        pack(corpus, tokens, tmp_path / "out", **settings | {"chat_template_date": "2025-02-01"})
    with pytest.raises(ValueError, match=r"--chat-template is"):
        pack(corpus, tokens, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"messages_field": None, "train_on": "assistant"}, "--train-on: is about conversations"),
        ({"text_field": "body"}, "expected one of them"),
        ({"special_tokens": "text"}, "leave it at parse"),
        ({"chat_template_date": "31.1.2025"}, "expected a day"),
        ({"chat_template_args": ["messages=[]"]}, "which is not to be set"),
        ({"chat_template_args": ["x"]}, "expected KEY=VALUE"),
    ],
)
def test_options_that_do_not_fit_together(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackConfig(["c.jsonl"], "tok", "out", **({"messages_field": "messages"} | settings))
