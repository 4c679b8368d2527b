"""The tables of docs/attention.md say what the kernels say."""

from scripts import attention_table
from scripts.lib import page


def _differs() -> int:
    tables = attention_table.tables()
    return page.renew(attention_table.PAGE, "attention_table.py", tables, check=True)


def test_the_page_is_up_to_date():
    assert not _differs(), "run scripts/attention_table.py"


def test_a_kernel_that_can_more_changes_the_page(monkeypatch):
    monkeypatch.setattr(attention_table.kernels, "LONG", 1 << 20)
    assert _differs()
