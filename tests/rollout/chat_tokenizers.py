"""Real tokenizers with chat templates of the kinds that are met: bytes, ChatML, tools, thoughts."""

from __future__ import annotations

from byte_tokenizer import byte_tokenizer
from tokenizers import AddedToken, decoders
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
HERMES_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
        {%- set messages = messages[1:] %}
    {%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\nCall: <tool_call>{"name": <name>, "arguments": <object>}</tool_call><|im_end|>\n' }}
{%- endif %}
"""
MAY_THINK = CHATML.replace(
    "assistant\n' }}",
    """assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}""",
)


def chatml(template: str = CHATML, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Byte-level, with ChatML's special tokens; its EOS may be another than the template's."""
    backend = byte_tokenizer(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer
