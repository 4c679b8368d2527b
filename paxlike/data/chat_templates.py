"""Chat templates by name, in the language of Hugging Face's `chat_template`.

They take user, assistant and system messages, and end with eos or the model's end-of-turn.
"""

# The forms of the models' own cards. `bos_token` is empty where the tokenizer has none.
TEMPLATES = {
    "chatml": (
        "{{ bos_token }}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}"
        "{% set ns.system = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}"
        "{% elif m.role == 'assistant' %}"
        "{{ ' ' + m.content.strip() + ' ' + eos_token }}"
        "{% else %}"
        "{{ bos_token + '[INST] ' + (ns.system + m.content).strip() + ' [/INST]' }}"
        "{% set ns.system = '' %}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content.strip() }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "{% set ns = namespace(system='') %}{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content.strip() + '\\n\\n' %}{% else %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ ns.system + m.content.strip() }}<end_of_turn>\n"
        "{% set ns.system = '' %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}\n\n"
        "{% else %}### Instruction:\n{{ m.content }}\n\n### Response:\n{% endif %}{% endfor %}"
    ),
    # The prompt, one space unless it ends in white space, the answer, eos.
    "plain": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}"
        "{{ '' if loop.first or messages[loop.index0 - 1].content[-1:].isspace() else ' ' }}"
        "{{ m.content.strip() }}{{ eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
}
# Tokens without which a template by name would be spelled out in pieces.
NEEDS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
