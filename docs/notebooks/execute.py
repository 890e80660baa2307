"""Run the notebooks of this folder from the first cell to the last, and write them with what they print.

``python docs/notebooks/execute.py`` runs all of them, ``… fastai`` one. Needs the extra ``notebooks``. A notebook with
a cell that fails is left as it was.
"""

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # another in every run
STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "mystnb": {"execution_mode": "off"},  # a site shows what is committed
}


def main(names: list[str]) -> None:
    """Run the notebooks called so; all for none."""
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as empty:
            NotebookClient(notebook, timeout=900, resources={"metadata": {"path": empty}}).execute()
        notebook.metadata = METADATA
        for cell in notebook.cells:
            cell.metadata = {}
            if cell.cell_type == "code":
                outputs = [tidy(output) for output in cell.outputs if output.get("name") != "stderr"]
                cell.outputs = [output for output in outputs if output is not None]
        nbformat.validate(notebook)
        nbformat.write(notebook, path)


def tidy(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """An output without addresses and progress bars that have gone; None if nothing is left to see."""
    if "text" in output:
        output.text = ADDRESS.sub("", output.text)
    data = output.get("data", {})
    data.pop("text/markdown", None)  # a table once more
    if "text/html" in data:
        data["text/html"] = STYLE.sub("", data["text/html"]).strip()
        if data["text/html"] in ("", "<div></div>"):
            return None
    if "text/plain" in data:
        data["text/plain"] = ADDRESS.sub("", data["text/plain"])
    return output


if __name__ == "__main__":
    main(sys.argv[1:])
