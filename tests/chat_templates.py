"""Chat templates of the kinds that models carry, small: what each has that makes it hard to find the answers."""

from __future__ import annotations

CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""

# Marks its answers, as transformers wants it for `return_assistant_tokens_mask`.
CHATML_MARKED = """\
{%- for message in messages %}{%- if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{%- else %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""

# Trims contents, and writes the date into a system part of its own.
LLAMA3 = """\
{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '<|eot_id|>' }}\
{%- for message in messages %}\
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# No generation prompt; the system message goes into the last message of the user, wherever that is.
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}\
{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for message in rest %}\
{%- if message['role'] == 'user' %}{%- if loop.last or (loop.index0 == rest | length - 2) %}\
{{- '[INST] ' + (system + '\\n\\n' if system is defined else '') + message['content'] + ' [/INST]' }}{%- else %}\
{{- '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}\
{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}\
{%- else %}{{- raise_exception('roles must alternate') }}{%- endif %}{%- endfor %}"""

# The channel is for the model to say, and only the last answer ends with the token that a model stops with.
HARMONY = """\
{{- '<|start|>system<|message|>Reasoning: low<|end|>' }}{%- for message in messages %}\
{%- if message.role == 'assistant' %}{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}\
{%- if loop.last and not add_generation_prompt %}{{- '<|return|>' }}{%- else %}{{- '<|end|>' }}{%- endif %}\
{%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# Only the last answer has a (here empty) thought before it.
THINKING = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}\
{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}\
{{- message.content + '<|im_end|>\\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The generation prompt opens a thought, which what is written for an answer does not.
OPENS_A_THOUGHT = THINKING.replace(
    "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}"
)  # fmt: skip

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
)

CONVERSATION = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who <|im_end|> grinds?"},
    {"role": "assistant", "content": "The mill."},
    {"role": "user", "content": " And \n\n what? "},
    {"role": "assistant", "content": "Grain, naïve 小麦 🌾."},
)
