"""The frame of a page: all that is put into it is text."""

from tessera.reporting import page as page_html


def test_a_table_holds_text_and_leaves_out_an_empty_head():
    told = page_html.table(("a<b", ""), [("<script>", "1 & 2")])
    assert "<th>a&lt;b</th><th></th>" in told
    assert "<td>&lt;script&gt;</td><td>1 &amp; 2</td>" in told
    assert "<th>" not in page_html.table(("", ""), [("x", "y")])


def test_a_document_knows_light_and_dark_and_the_width_of_a_phone():
    told = page_html.document("a<b", "<p>body</p>", ".mine { color: red }")
    assert "<title>a&lt;b</title>" in told
    for part in ("prefers-color-scheme: dark", "width=device-width", "<p>body</p>", ".mine { color: red }"):
        assert part in told
