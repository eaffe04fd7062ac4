"""The executed series as pages that open without a network: `python -m advlab report`. Figures are inside the pages, formulas are MathML, which
browsers draw themselves, and no script or style is fetched from anywhere."""

import html
import os
import re
from pathlib import Path

from advlab import paths, report

STYLE = """body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em } pre { font-size: 13px; overflow-x: auto; margin: 0 }
.input { background: #f6f6f6; border-left: 3px solid #ccc; padding: .4em .8em; margin: .8em 0 } .prompt, .anchor-link { display: none }
.output { margin: .4em 0 1em; overflow-x: auto } img { max-width: 100% } table { border-collapse: collapse; font-size: 13px }
td, th { border-bottom: 1px solid #ddd; padding: .2em .7em; text-align: left }"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body>{body}</body></html>
"""


def exporter():
    """nbconvert's HTML exporter without its page, scripts and styles, formulas as MathML."""
    import latex2mathml.converter
    from nbconvert.exporters import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str, display: str = "inline") -> str:
            return latex2mathml.converter.convert(body.replace(r"\arg", r"\operatorname{arg}"), display=display)  # it knows min and max only

        def block_math(self, body: str) -> str:
            return self.inline_math(body, "block")

    def markdown(source: str) -> str:
        return MarkdownWithMath(renderer=Renderer(escape=False, embed_images=True, path=str(paths.notebooks()))).render(source)

    made = HTMLExporter(template_name="basic")
    made.register_filter("markdown2html", markdown)
    return made


def export(profile: str) -> Path:
    """Pages of every executed notebook runs/<profile>/<data set>/NN_slug.ipynb in runs/<profile>/report/, and their index, whose path it returns.
    FileNotFoundError where none has run. Links between notebooks lead to their pages, or to the notebook where it has
    not run; links to other files to the files."""
    import nbformat
    from pygments.formatters import HtmlFormatter

    folder, made, lines = paths.runs(profile, "report"), exporter(), []
    executed = sorted(paths.runs(profile, "any").parent.glob("*/[0-9][0-9]_*.ipynb"), key=lambda f: (f.stem, f.parent.name))
    if not executed:
        raise FileNotFoundError(f"no notebook has run with profile {profile}; make reproduce PROFILE={profile} first")
    style = STYLE + HtmlFormatter().get_style_defs(".highlight")
    back = Path(os.path.relpath(paths.home(), folder / "any")).as_posix()
    pages = {file.stem: file.parent.name for file in executed}  # of a notebook that ran on several data sets, the last; a page's own comes first
    for file in executed:
        own = pages | {other.stem: file.parent.name for other in executed if other.parent == file.parent}

        def page_of(link: re.Match, own: dict = own) -> str:
            return f'href="../{own[link[1]]}/{link[1]}.html"' if link[1] in own else f'href="{back}/notebooks/{link[1]}.ipynb"'

        notebook = nbformat.read(file, as_version=4)
        title = next((c.source.splitlines()[0].lstrip("# ") for c in notebook.cells if c.cell_type == "markdown"), file.stem)
        body = re.sub("(?s)<script.*?</script>", "", made.from_notebook_node(notebook)[0])  # of progress bars and other widgets
        body = re.sub(r'href="(\d\d_\w+)\.ipynb"', page_of, body.replace('href="../', f'href="{back}/'))
        page = PAGE.format(title=html.escape(title), style=style, body=f'<p><a href="../index.html">all notebooks</a></p>{body}')
        report.write_atomic(folder / file.parent.name / f"{file.stem}.html", page.encode())
        lines.append(f'<tr><td><a href="{file.parent.name}/{file.stem}.html">{html.escape(title)}</a></td><td>{file.parent.name}</td></tr>')
    body = f"<h1>advlab, profile {profile}</h1><table><tr><th>notebook</th><th>data</th></tr>{''.join(lines)}</table>"
    return report.write_atomic(folder / "index.html", PAGE.format(title="advlab", style=STYLE, body=body).encode())
