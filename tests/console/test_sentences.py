"""The parser's trees of alternatives, and Lightning's long errors, end in one sentence."""

from __future__ import annotations

import re
from argparse import ArgumentError

import pytest

from fedlight.console.completion import command
from fedlight.console.errors import mendable, one_sentence, one_sentence_of
from fedlight.core.errors import ConfigurationError

TREE = """Parser key "model.codec":

  - Expected a path but {"class_path": "ChainCodec"} either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [<class 'fedlight.core.codec.Codec'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'fedlight.ChainCodec':
        Parser key "codecs":
          Expected a dot import path string: LinarCodec
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'ChainCodec'}"""

UNION = """Parser key "model.codec":
  Does not validate against any of the Union subtypes
  Errors:
    - Problem with given class_path 'fedlight.TransformCodec':
        Option 'ration' is not accepted
    - Expected a <class 'NoneType'>
  Given value: NestedArg(key='ration', val='3')"""

LITERAL = "Parser key \"model.weighting\":\n  Expected a typing.Literal['equal', 'samples']. Got value: equally"
WANDB = "Does not validate\n  - Problem with given class_path 'x.WandbLogger':\n      Requirement 'wandb>=0.12' not met. HINT: pip install"
EARLY = (
    "Early stopping conditioned on metric `val/acc` which is not available. Pass in or modify your `EarlyStopping` callback to use any of "
    "the following: `val/accuracy`, `val/loss`"
)

ERRORS = {
    TREE: "model.codec.codecs: there is no class LinarCodec; one of your own needs its module, as in my_module.LinarCodec",
    UNION: "model.codec: TransformCodec has no argument ration",
    LITERAL: "Expected model.weighting to be one of equal, samples but got equally",
    WANDB: "Requirement 'wandb",
    EARLY: "`monitor` of EarlyStopping to be a metric of the run but got val/acc; did you mean val/accuracy?",
    "unrecognized arguments: --model.codek=3": "There is no option --model.codek; did you mean --model.codec?",
    "Subcommand 'fit' does not accept option 'modl.x'": "There is no option modl.x",
    "the following arguments are required: fit.model.network": "Expected model.network but got none",
    "argument --trainer.max_steps: expected one argument": "Expected a value after --trainer.max_steps but got none",
}


@pytest.mark.parametrize("text", ERRORS)
def test_one_sentence(text):
    told = one_sentence_of(text, known=["model.codec", "model.network"])
    assert ERRORS[text] in told and "\n" not in told and "Subtypes" not in told


def test_only_what_a_user_can_mend_is_told_without_a_traceback(capsys):
    assert mendable(ArgumentError(None, UNION)) == ERRORS[UNION]
    assert mendable(ConfigurationError("Expected this")) == "Expected this"
    assert (
        mendable(type("MisconfigurationException", (Exception,), {})("No supported gpu backend found!"))
        == "No supported gpu backend found!"
    )
    assert mendable(KeyError("a fault of ours")) is None
    with pytest.raises(KeyError), one_sentence():
        raise KeyError("a fault of ours")
    with pytest.raises(SystemExit) as ended, one_sentence():
        raise ConfigurationError("Expected this")
    assert ended.value.code == 2 and capsys.readouterr().err == "fedlight: error: Expected this\n"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "Expected shell after `fedlight completion` but got none (fedlight completion --help)"),
        (["bahs"], "Expected shell after `fedlight completion` to be one of bash, zsh but got bahs; did you mean bash?"),
        (["bash", "--to", "x"], "`fedlight completion` takes no --to x"),
    ],
)
def test_small_subcommands_speak_alike(args, sentence):
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        command(args)
