"""The tables of docs/attention.md say what the kernels say."""

from scripts import attention_table


def test_the_page_is_up_to_date():
    text = attention_table.PAGE.read_text()
    assert attention_table.renewed(text) == text, "run scripts/attention_table.py"


def test_a_kernel_that_can_more_changes_the_page(monkeypatch):
    text = attention_table.PAGE.read_text()
    monkeypatch.setattr(attention_table.kernels, "LONG", 1 << 20)
    assert attention_table.renewed(text) != text
