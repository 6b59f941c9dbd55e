"""The Chinese edition, made from the English notebooks: one source, two languages.

    notebooks/NN_name.ipynb --- text blocks ---> locale/zh_CN/NN_name.po     (translated, in Poedit or Weblate)
             |                                          |
             +--- code cells, byte for byte ---+--------+--> notebooks/zh/NN_name.ipynb
             +--- outputs of the same run -----+
    README.md --------------------------------- README.po --> README.zh-CN.md
    GLOSSARY.md (both languages) ----------------------------> GLOSSARY.zh-CN.md
    words in figures, alternative texts ------ figures.po --> pictures of the Chinese notebooks (chinese_figures.py)

    python scripts/chinese_edition.py --update   # new English blocks into the PO files; changed ones become "fuzzy"
    python scripts/chinese_edition.py            # PO files -> notebooks/zh/, README.zh-CN.md, GLOSSARY.zh-CN.md
    python scripts/chinese_edition.py --check    # what is untranslated, fuzzy, or not written out yet

A block is what stands between two blank lines: a paragraph, a list, a table, one folded answer. Blocks of code are not
messages. Babel keeps the PO files: a block that changed a little keeps its old translation, marked fuzzy, which
`--check` refuses until somebody has looked at it.
"""

import argparse
import base64
import copy
import hashlib
import html
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
from babel.messages import Catalog
from babel.messages.pofile import read_po, write_po
from chinese_figures import PICTURE, SVG_TEXT, fewer_colours, message_of, svg_in_chinese, words
from nbformat import NotebookNode

PROJECT = Path(__file__).resolve().parents[1]
LOCALE, FIGURES = "zh_CN", "figures"
SOURCE_OF = "of"  # in the metadata of a Chinese picture: which English one it goes with
README, GLOSSARY = "README.md", "GLOSSARY.md"
PAIRS = {name: f".zh-CN{Path(name).suffix}" for name in (README, GLOSSARY, "docs/memory_two_t4.png")}
ENTRY = re.compile(
    r"^\*\*(?P<word>.+?) · (?P<chinese>.+?)\*\* (?P<where>\(.*\))<br>\n(?P<meaning>.+)<br>\n(?P<said>.+)$", re.M
)
NOT_IN_CHINESE = re.compile(
    r"<!-- block: map -->.*?<!-- end of block -->", re.DOTALL
)  # a line a file, from English docstrings
LINK = re.compile(r"(?P<before>\]\(|(?:src|href)=\")(?P<to>(?![a-z]+:|#)[^)\"\s#]+)(?P<after>#[^)\"\s]*)?(?=[)\"])")
LETTERS = re.compile(r"[A-Za-z]{2,}")
ADVICE = "make zh    then look at these messages in locale/zh_CN/, take out 'fuzzy' where it stands, and make zh again"
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def sources(project: Path = PROJECT) -> dict[str, Path]:
    """Name of a PO file -> the notebook or page that it translates."""
    folder = project / "notebooks"
    notebooks = [path for part in (".", "appendix") for path in sorted((folder / part).glob("*.ipynb"))]
    return {path.stem: path for path in [*notebooks, project / README]}


def twin(path: Path, project: Path = PROJECT) -> Path:
    """Where the other edition of a page, or the Chinese one of a notebook lies; any other file is its own twin."""
    for name, ending in PAIRS.items():
        english = project / name
        if path in (pair := [english, english.with_suffix(ending)]):
            return pair[1 - pair.index(path)]
    if path.suffix == ".ipynb" and path.is_relative_to(project / "notebooks"):
        return project / "notebooks" / "zh" / path.relative_to(project / "notebooks")
    return path


def blocks(text: str) -> list[str]:
    """A Markdown text cut at blank lines that are not within a block of code; joined by two line ends it is whole."""
    found: list[str] = []
    fenced = False
    for piece in re.split(r"\n\n", text):
        if fenced:
            found[-1] += f"\n\n{piece}"
        else:
            found.append(piece)
        fenced ^= len(re.findall(r"^ *```", piece, re.MULTILINE)) % 2 == 1
    return found


def is_message(block: str) -> bool:
    """Whether there is anything to translate: no code, no lone tag, not only numbers."""
    words = re.sub(r"<[^>]*>|`[^`]*`|\]\([^)]*\)", " ", block)
    return not block.lstrip().startswith("```") and LETTERS.search(words) is not None


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """(text, where) of each text cell of a notebook, or of a page as a whole."""
    if path.suffix != ".ipynb":
        yield NOT_IN_CHINESE.sub("", path.read_text(encoding="utf-8")), path.name
        return
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells, 1):
        if cell.cell_type == "markdown":
            yield cell.source, f"cell {number}"


def messages(path: Path) -> dict[str, list[str]]:
    """Message -> where it stands, in reading order."""
    found: dict[str, list[str]] = {}
    for text, where in texts(path):
        for block in filter(is_message, blocks(text)):
            found.setdefault(block, []).append(where)
    return found


def read_catalog(path: Path) -> Catalog:
    """The catalogue in a PO file; an empty one where there is no file yet."""
    if not path.is_file():
        return Catalog(locale=LOCALE, fuzzy=False)
    return read_po(io.BytesIO(path.read_bytes()), locale=LOCALE)


def update(path: Path, wanted: dict[str, list[str]]) -> None:
    """Bring a PO file to the messages of today: new ones empty, changed ones fuzzy, those no longer used gone."""
    catalog, template = read_catalog(path), Catalog(fuzzy=False)
    for message, places in wanted.items():
        template.add(message, auto_comments=places)
    catalog.update(template, update_creation_date=False)
    catalog.obsolete.clear()
    catalog.fuzzy = False
    text = io.BytesIO()
    write_po(text, catalog, width=0, omit_header=False, include_previous=True)
    dates = re.compile(rb'^"(POT-Creation-Date|PO-Revision-Date|Generated-By|Last-Translator|Language-Team).*\n', re.M)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dates.sub(b"", text.getvalue()))


def translations(catalog: Catalog) -> dict[str, str]:
    """Message -> translation, of those that are there and not fuzzy."""
    return {str(one.id): str(one.string) for one in catalog if one.id and one.string and not one.fuzzy}


def translate(text: str, known: dict[str, str]) -> str:
    """A Markdown text with every known block replaced."""
    return "\n\n".join(known.get(block, block) for block in blocks(text))


def move_links(text: str, here: Path, there: Path, project: Path = PROJECT) -> str:
    """Relative links of a text that moves from file `here` to file `there`: to the Chinese twin where there is one."""

    def moved(link: re.Match[str]) -> str:
        target = twin(Path(os.path.normpath(here.parent / link["to"])), project)
        to = Path(os.path.relpath(target, there.parent)).as_posix()
        return f"{link['before']}{to}{link['after'] or ''}"

    return LINK.sub(moved, text)


def picture_name(picture: str) -> str:
    """Short name of a base64 picture."""
    return hashlib.sha256(picture.encode()).hexdigest()[:16]


def take_pictures(notebook: NotebookNode) -> dict[str, tuple[str, str]]:
    """Take the Chinese pictures out of a cleaned notebook that has just run: English picture's name -> picture, alt."""
    found = {}
    for output in outputs(notebook):
        chinese = output.get("data", {}).pop(PICTURE, None)
        alt = output.get("metadata", {}).pop(PICTURE, {}).get("alt", "")
        if chinese and "image/png" in output.data:
            plain = base64.b64encode(fewer_colours(base64.b64decode(chinese))).decode()
            found[picture_name(output.data["image/png"])] = (plain, alt)
    return found


def svg_messages(notebook: NotebookNode) -> list[str]:
    """The messages of the SVG pictures of a notebook."""
    svgs = [output["data"].get("image/svg+xml", "") for output in outputs(notebook) if "data" in output]
    found = (message_of(html.unescape(text))[0] for svg in svgs for text in SVG_TEXT.findall(svg))
    return [message for message in found if message]


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """All outputs of all cells."""
    for cell in notebook.cells:
        yield from cell.get("outputs", ())


def kept_pictures(path: Path) -> dict[str, tuple[str, str]]:
    """The Chinese pictures of a notebook that was written before."""
    found = {}
    for output in outputs(nbformat.read(path, as_version=4)) if path.is_file() else ():
        about = output.get("metadata", {}).get("image/png", {})
        if SOURCE_OF in about:
            found[about[SOURCE_OF]] = (output.data["image/png"], about.get("alt", ""))
    return found


def chinese_notebook(
    english: NotebookNode, known: dict[str, str], pictures: dict[str, tuple[str, str]], path: Path, project: Path
) -> NotebookNode:
    """The notebook with its text in Chinese: code cells and printed outputs as they are, pictures where there are any.

    Args:
        english: the source, with outputs.
        known: message -> translation.
        pictures: English picture's name -> Chinese picture and its alternative text.
        path: of the source, and
        project: the folder that it belongs to, for links.
    """
    result, in_figures = copy.deepcopy(english), words(catalog_path(FIGURES, project))
    there = twin(path, project)
    badge_ends = [f'/{file.relative_to(project).as_posix()}"' for file in (path, there)]
    for cell in result.cells:
        if cell.cell_type == "markdown":
            text = translate(cell.source, known).replace(*badge_ends)  # a badge opens the notebook that it stands in
            cell.source = move_links(text, path, there, project)
    for output in outputs(result):
        data = output.get("data", {})
        name = picture_name(data.get("image/png", ""))
        if name in pictures:
            data["image/png"], alt = pictures[name]
            output.metadata["image/png"] = {SOURCE_OF: name, "alt": alt}
        if "image/svg+xml" in data:
            data["image/svg+xml"] = svg_in_chinese(data["image/svg+xml"], in_figures)
    return result


def catalog_path(name: str, project: Path) -> Path:
    """The PO file of that name."""
    return project / "locale" / LOCALE / f"{name}.po"


def written(path: Path, pictures: dict[str, tuple[str, str]] | None = None, project: Path = PROJECT) -> str:
    """The text of the Chinese twin of `path`, made of its PO file and, without `pictures`, of those that it has."""
    if path.name == GLOSSARY:
        return glossary(project)
    known = translations(read_catalog(catalog_path(path.stem, project)))
    there = twin(path, project)
    if path.suffix != ".ipynb":
        (text, _), *_ = texts(path)
        return move_links(translate(text, known), path, there, project)
    english = nbformat.read(path, as_version=4)
    shown = kept_pictures(there) | (pictures or {})
    return nbformat.writes(chinese_notebook(english, known, shown, path, project)).rstrip("\n") + "\n"


def glossary(project: Path = PROJECT) -> str:
    """The Chinese half of the glossary."""
    head, anchor, entries = (project / GLOSSARY).read_text(encoding="utf-8").partition("<a id=")
    there = twin(project / GLOSSARY, project)
    title = f"[English, 中英对照]({there.name}) · [README]({README})\n\n# 术语表"
    chinese = ENTRY.sub(r"**\g<chinese>** · \g<word> \g<where><br>\n\g<said>", entries)
    text = f"{title}\n\n{blocks(head.strip())[-1]}\n\n{anchor}{chinese}"
    return move_links(text, project / GLOSSARY, there, project)


def write(path: Path, pictures: dict[str, tuple[str, str]] | None = None, project: Path = PROJECT) -> None:
    """Write the Chinese twin of a notebook or of a page."""
    target = twin(path, project)
    text = written(path, pictures, project)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, target)


def meet(found: dict[str, Iterable[str]], project: Path = PROJECT) -> None:
    """Bring the catalogue of figures to what was met in them today.

    Args:
        found: name of a notebook or page -> the messages of all its figures; of others the catalogue keeps what it has.
        project: where the catalogue lies.
    """
    path = catalog_path(FIGURES, project)
    places = {
        str(one.id): [place for place in one.auto_comments if place not in found]
        for one in read_catalog(path)
        if one.id
    }
    for name, messages_here in found.items():
        for message in dict.fromkeys(messages_here):
            places.setdefault(message, []).append(name)
    update(path, {message: sorted(places[message]) for message in sorted(places) if places[message]})


def keep(fresh: dict[Path, dict[str, tuple[str, str]]], met: Path, project: Path = PROJECT) -> None:
    """After a run that wrote the English notebooks: note the words of their figures, and write their twins.

    Args:
        fresh: notebook -> the Chinese pictures of this run.
        met: folder with NAME.words.jsonl for each notebook that has figures, one message a line.
        project: where notebooks and catalogues lie.
    """
    found = {}
    for path in fresh:
        words_here = met / f"{path.stem}.words.jsonl"
        lines = words_here.read_text(encoding="utf-8").splitlines() if words_here.is_file() else []
        found[path.stem] = [*map(json.loads, lines), *svg_messages(nbformat.read(path, as_version=4))]
    meet(found, project)
    for path, pictures in fresh.items():
        write(path, pictures, project)


def numbers(text: str) -> list[str]:
    """The numbers of a text outside links and tags, sorted."""
    return sorted(NUMBER.findall(re.sub(r"<[^>]*>|\]\([^)]*\)", " ", text)))


def message_faults(message: str, translation: str) -> Iterable[str]:
    """What a translation lost or added: code, links, numbers, tags."""
    for what, pattern in (("code", r"`[^`\n]+`"), ("link", r"\]\([^)]*\)"), ("tag", r"</?[a-z]+")):
        lost = set(re.findall(pattern, message)) ^ set(re.findall(pattern, translation))
        if lost:
            yield f"{what} that only one of both has: {sorted(lost)}"
    if lost := set(numbers(message)) - set(numbers(translation)):
        yield f"numbers are missing: {sorted(lost)}"


def catalog_faults(name: str, wanted: Iterable[str], project: Path = PROJECT) -> list[str]:
    """What the PO file of that name lacks of the messages `wanted`, in words."""
    path = catalog_path(name, project)
    catalog, po = read_catalog(path), path.relative_to(project)
    found = []
    for message in wanted:
        entry, short = catalog.get(message), message[:60].replace("\n", " ")
        if entry is None:
            found.append(f"{po}: not in the PO file: {short}")
        elif not entry.string:
            found.append(f"{po}: not translated: {short}")
        elif entry.fuzzy:
            found.append(f"{po}: the English changed, look at the translation and take out 'fuzzy': {short}")
        else:
            found += [f"{po}: {fault}: {short}" for fault in message_faults(message, str(entry.string))]
    return found


def cells(text: str) -> list[tuple[str, str]]:
    """Kind and source of each cell of a notebook's text, without its outputs."""
    return [(cell.cell_type, cell.source) for cell in nbformat.reads(text, as_version=4).cells] if text else []


def faults(project: Path = PROJECT, with_outputs: bool = True) -> list[str]:
    """Everything in which the Chinese edition is behind the English one.

    Without `with_outputs` outputs of cells are not compared: every run of the notebooks changes some.
    """
    in_figures = read_catalog(catalog_path(FIGURES, project))
    found = catalog_faults(FIGURES, [str(one.id) for one in in_figures if one.id], project)
    for name, path in sources(project).items():
        found += catalog_faults(name, messages(path), project)
    twins = {twin(path, project): path for path in [*sources(project).values(), project / GLOSSARY]}
    for there, path in twins.items():
        kept, fresh = there.read_text(encoding="utf-8") if there.is_file() else "", written(path, project=project)
        where, notebook = there.relative_to(project), there.suffix == ".ipynb"
        if kept != fresh and (with_outputs or not notebook or cells(kept) != cells(fresh)):
            found.append(f"{where}: not what its PO file gives")
        elif with_outputs and notebook:
            shown = sum("image/png" in output.get("data", {}) for output in outputs(nbformat.read(there, as_version=4)))
            if english := shown - len(kept_pictures(there)):
                found.append(f"{where}: {english} English pictures; install fonts-noto-cjk and run make notebooks")
    left = set((project / "notebooks" / "zh").rglob("*.ipynb")) - set(twins)
    return [*found, *(f"{path.relative_to(project)}: the English one is gone, remove it" for path in sorted(left))]


def main() -> None:
    """Update the PO files, write the edition, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="bring the PO files to the English of today")
    parser.add_argument("--check", action="store_true", help="exit status 1 and a list if something is behind")
    parser.add_argument("names", nargs="*", help="only these, such as 01_download_weights")
    options = parser.parse_args()
    if options.check:
        behind = faults()
        print("\n".join([*behind, ADVICE] if behind else ["Both editions say the same."]))
        sys.exit(bool(behind))
    if not options.update:
        write(PROJECT / GLOSSARY)
    for name, path in sources().items():
        if not options.names or name in options.names:
            if options.update:
                update(catalog_path(name, PROJECT), messages(path))
            else:
                write(path)


if __name__ == "__main__":
    main()
