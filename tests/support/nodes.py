"""HTML pages parsed, and hostile text for them."""

import shutil
from html.parser import HTMLParser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;'"

VOID = {"meta", "img", "br", "path", "use"}


class Node(HTMLParser):
    """A page as a tree: tag, attributes, children; children are nodes or text."""

    def __init__(self, html: str = "", tag: str = "", attributes: dict | None = None):
        super().__init__()
        self.tag, self.attributes, self.children = tag, attributes or {}, []
        self.stack = [self]
        if html:
            self.feed(html)
            assert [node.tag for node in self.stack] == [""], "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        node = Node(tag=tag, attributes=dict(attrs))
        self.stack[-1].children.append(node)
        if tag not in VOID - {"path", "use"} and not self.get_starttag_text().endswith("/>"):
            self.stack.append(node)

    def handle_startendtag(self, tag, attrs):
        self.stack[-1].children.append(Node(tag=tag, attributes=dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop().tag == tag

    def handle_data(self, data):
        self.stack[-1].children.append(data)

    def all(self, tag: str | None = None) -> list["Node"]:
        nodes = [child for child in self.children if isinstance(child, Node)]
        found = [node for child in nodes for node in (child, *child.all())]
        return [node for node in found if tag in (None, node.tag)]

    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text() for child in self.children)
        return " ".join(part.strip() for part in parts if part.strip())


def section(page: Node, title: str) -> Node:
    (found,) = (node for node in page.all("section") if node.all("h2")[0].text() == title)
    return found
