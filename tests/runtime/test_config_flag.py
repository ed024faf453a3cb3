from tests.commands import finish, refusal, start


def test_flags_in_a_file_that_is_no_text_are_refused_as_such(tmp_path):
    (tmp_path / "flags").write_bytes(b"\xff\xfe")
    assert "can't decode" in refusal("mnist_flax.main", f"--flagfile={tmp_path / 'flags'}")


def test_a_recipe_in_a_file_of_flags_is_checked_as_any(tmp_path):
    for flag, hint in (
        ("--config=nowhere.py", "nowhere.py is no file"),
        ("--config=configs/digits.py\n--config.sed=1", "did you mean config.seed?"),
        ("--config.num_epochs=0\n--config\nconfigs/digits.py", "config.num_epochs=0 is out of range"),
    ):
        (tmp_path / "flags").write_text(flag)
        assert hint in refusal("mnist_flax.main", f"--flagfile={tmp_path / 'flags'}")


def test_a_recipe_may_take_an_argument():
    code = (
        "import mnist_flax.main as m; from absl import flags; flags.FLAGS(m._ARGUMENTS); print(m._CONFIG.value.dataset)"
    )
    arguments = ("--config.seed=1", "--config=configs/default.py:fashion_mnist")
    assert finish(start(code, *arguments, option="-c")).stdout == "fashion_mnist\n"


def test_overrides_may_come_first_and_set_a_field_back_to_none(digits_data_dir):
    arguments = ("--config.train_examples=None", "--config.dataset=digits", "--config", "configs/speedrun.py")
    fields = (f"--config.data_dir={digits_data_dir}", "--config.batch_size=9999")
    assert "1,438 training examples" in refusal("mnist_flax.main", *arguments, *fields)
