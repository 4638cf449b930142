"""What a run trains on, and what a resumed one is refused."""

import dataclasses

import pytest

from albor.config import ConfigError, load_recipe
from albor.texts import find_texts
from albor.tokenizer import Tokenizer


def source(package: int, number: int) -> str:
    lines = [
        f"def work_{package}_{number}_{i}(x):\n    return x + {i}\n"
        for i in range(9)
    ]
    return "\n".join(lines)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own: texts of ten packages, and a tokenizer of theirs."""
    (tmp_path / "_toc.yml").write_text("")
    texts = []
    for package in range(10):
        folder = tmp_path / "texts" / f"package{package}"
        folder.mkdir(parents=True)
        for number in range(3):
            texts.append(source(package, number))
            (folder / f"part{number}.py").write_text(texts[-1])
    Tokenizer.train(texts, vocab_size=300).save(tmp_path / "words")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(project):
    recipe = load_recipe(
        __file__.replace("tests/test_texts.py", "configs/train/pretrain-tiny.yaml")
    )
    data = dataclasses.replace(
        recipe.data, train=str(project / "texts"), tokenizer=str(project / "words")
    )
    return dataclasses.replace(recipe, data=data)


@pytest.mark.parametrize("changed", ["corpus", "tokenizer"])
def test_a_resumed_run_is_refused_other_texts(project, changed):
    recipe = recipe_of(project)
    about, tokenizer, tokens = find_texts(recipe)
    before = {
        "corpus": about["digest"],
        "tokenizer": tokenizer.digest,
        "data": tokens.name,
    }
    state = project / "run" / "state" / "step-1"  # its folder has lost its record
    again = find_texts(recipe, state, before)
    assert again[1].digest == tokenizer.digest
    if changed == "corpus":
        (project / "texts" / "package3" / "part1.py").write_text(source(77, 7))
    else:
        texts = [source(n, n) for n in range(40, 50)]
        Tokenizer.train(texts, vocab_size=290).save(project / "words")
    with pytest.raises(
        ConfigError, match=f"started (on|with) the {changed}"
    ) as caught:
        find_texts(recipe, state, before)
    assert before[changed][:16] in str(caught.value)
