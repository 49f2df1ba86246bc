"""Variety, grade fidelity, usefulness, distances by label, and what the sets are made of."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.labels import known, provider_in
from metrics.diversity import diversity_section
from metrics.images import choose, draw_set, image_set, read_images, side_of
from metrics.quality import FeatureSets, Pair, Side, compare, quality_section
from metrics.report import write_report
from metrics.section import Finding, Section, Table
from metrics.utility import Classifier, Labelled, balanced_accuracy, confusion, grades_section, guessing, utility_section

LABELS = np.repeat(["benign", "gleason3", "gleason4"], 60)


def labelled(seed, noise=1.0, labels=LABELS):
    draws = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(0, 1, (3, 8)) * 2
    which = np.unique(labels, return_inverse=True)[1]
    features = (centres[which] + draws.normal(0, noise, (len(labels), 8))).astype(np.float32)
    return Labelled(features, labels, np.array([f"s{seed}-{index % 12}" for index in range(len(labels))]))


def as_images(part):
    return image_set(np.zeros((len(part.labels), 4, 4, 3), np.uint8), part.labels)


def variety(fake_features, fake_labels=LABELS):
    train, held_out = labelled(0), labelled(1)
    fake = Labelled(fake_features, fake_labels, fake_labels)
    sets = [as_images(part) for part in (train, held_out, fake)]
    features = {"train": train.features, "held_out": held_out.features, "fake": fake_features}
    return diversity_section(*sets, features, 0)


def test_a_collapsed_label_is_named_and_no_other():
    features = labelled(2).features
    features[60:120] = features[60] + 0.05 * features[60:120]
    assert [finding.text for finding in variety(features).findings] == [
        "collapse: gleason3 images are far less varied than real ones"
    ]


def test_a_few_images_over_and_over_are_collapse_too():
    features = labelled(2).features
    features[:60] = np.repeat(features[:12], 5, 0) + 0.01 * features[60:120]
    assert ["benign" in finding.text for finding in variety(features).findings] == [True]


@pytest.mark.parametrize("share", [0.2, 0.48])
@pytest.mark.parametrize("pairs", [True, False])
def test_images_that_come_again_are_named_before_they_are_half_of_a_label(share, pairs):
    features = labelled(2).features
    count = int(share * 60) // 2
    features[60 : 60 + 2 * count] = np.tile(features[60 : 60 + count], (2, 1)) if pairs else features[60]
    section = variety(features)
    assert [finding.text for finding in section.findings] == ["repetition: many images come again, nearly alike (of gleason3)"]
    assert section.numbers["gleason3"]["generated"]["repeats"] == pytest.approx(2 * count / 60)


@pytest.mark.parametrize("twins", [0, 1, 2, 3, 20])
def test_real_patches_that_are_there_twice_allow_no_repetition(twins):
    real, made = labelled(1).features.copy(), labelled(2).features.copy()
    real[60 : 60 + twins] = real[60 + twins : 60 + 2 * twins]
    made[60:72] = made[72:84]
    parts = {"train": real, "held_out": labelled(0).features, "fake": made}
    section = diversity_section(*(as_images(labelled(seed)) for seed in range(3)), parts, 0)
    assert section.numbers["gleason3"]["generated"]["repeats"] == pytest.approx(24 / 60)


def test_one_real_patch_over_and_over_is_no_measure():
    real = labelled(1).features.copy()
    real[60:120] = real[60]
    parts = {"train": real, "held_out": real, "fake": labelled(2).features}
    section = diversity_section(*(as_images(labelled(seed)) for seed in range(3)), parts, 0)
    assert "gleason3" not in section.numbers and "Variety of gleason3 was not tested" in section.untested[0]


def test_repeats_that_held_out_patches_have_too_are_none():
    real, doubled = labelled(1).features, labelled(2).features
    doubled[1::2] = doubled[::2]
    parts = {"train": real, "held_out": doubled, "fake": doubled}
    sets = [as_images(labelled(seed)) for seed in range(3)]
    assert all("repetition" not in finding.text for finding in diversity_section(*sets, parts, 0).findings)


@pytest.mark.parametrize(("again", "accused"), [(0, True), (12, True), (18, False)])
def test_repeats_are_counted_beyond_those_of_held_out_patches(again, accused):
    """24 of 60 images come again, and so do some held-out patches: up to 15 % more than these are borne."""
    real, held_out, made = labelled(0), labelled(1), labelled(2)
    for part, count in ((held_out, again), (made, 24)):
        part.features[60 : 60 + count] = np.tile(part.features[60 : 60 + count // 2], (2, 1))
    sets = [as_images(part) for part in (real, held_out, made)]
    section = diversity_section(*sets, {"train": real.features, "held_out": held_out.features, "fake": made.features}, 0)
    shares = [section.numbers["gleason3"][side]["repeats"] for side in ("generated", "held_out")]
    assert shares == pytest.approx([24 / 60, again / 60]) and bool(section.findings) == accused


def test_varied_images_are_not_accused():
    assert variety(labelled(2).features).findings == []


def test_the_classifier_learns_and_weighs_labels_alike():
    training, test = labelled(0), labelled(1)
    rare = training.take(np.r_[0:60, 60:120, 120:126])  # ten times fewer of one label
    matrix = confusion(test.labels, Classifier(rare).predict(test.features), np.unique(LABELS))
    assert balanced_accuracy(matrix) > 0.85
    assert matrix.sum() == 180 and matrix[2, 2] > 40


def test_balanced_accuracy_is_the_mean_over_labels_that_occur():
    assert balanced_accuracy(np.array([[9, 1, 0], [1, 1, 0], [0, 0, 0]])) == pytest.approx((0.9 + 0.5) / 2)


def test_shuffled_labels_are_named():
    fake = labelled(2)
    assert grades_section(labelled(0), labelled(1), fake).findings == []
    shuffled = Labelled(fake.features, np.random.default_rng(0).permutation(fake.labels), fake.groups)
    section = grades_section(labelled(0), labelled(1), shuffled)
    assert [finding.test for finding in section.findings] == ["grade fidelity"]
    assert section.numbers["held-out real"]["balanced_accuracy"] > 0.85


@pytest.mark.parametrize(("wrong", "accused"), [(6, False), (30, True)])
def test_labels_are_objected_to_from_half_the_margin_over_guessing(wrong, accused):
    """Half of them right is more than half of what held-out patches reach, and less than halfway to it from 1 in 3."""
    fake = labelled(2, 0.3)
    labels = np.concatenate([np.roll(np.unique(LABELS), -k)[np.repeat([1, 0], [wrong, 60 - wrong])] for k in range(3)])
    section = grades_section(labelled(0, 0.3), labelled(1, 0.3), replace(fake, labels=labels))
    assert section.numbers["held-out real"]["balanced_accuracy"] > 0.97
    assert section.numbers["generated"]["balanced_accuracy"] == pytest.approx(1 - wrong / 60, abs=0.01)
    assert bool(section.findings) == accused


def test_good_images_help_where_real_ones_are_few_and_noise_does_not():
    few = labelled(0, 2.5).take(np.arange(0, 180, 2))
    held_out, good = labelled(1, 2.5), labelled(2, 2.5)
    section = utility_section(few, held_out, good, 0)
    wrong = Labelled(good.features, np.roll(good.labels, 60), good.groups)
    worse = utility_section(few, held_out, wrong, 0)
    assert section.numbers["gain"]["value"] > worse.numbers["gain"]["value"] + 0.05
    assert worse.numbers["generated"]["value"] < 0.4 < section.numbers["generated"]["value"]
    real, both = (section.numbers[name]["value"] for name in ("real", "real and generated"))
    assert section.numbers["gain"]["value"] == pytest.approx(both - real)
    assert utility_section(few, held_out, good, 0).numbers == section.numbers


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_the_training_patches_gain_nothing(seed):
    train, held_out = labelled(0, 3.0), labelled(1, 3.0)
    copies = Labelled(train.features, train.labels, np.arange(180).astype(str))
    numbers = utility_section(train, held_out, copies, seed).numbers
    assert numbers["gain"]["value"] == 0 < numbers["gain"]["spread"]
    some = utility_section(train, held_out, copies.take(np.arange(seed, 180, 2)), seed).numbers["gain"]
    assert abs(some["value"]) <= 2 * some["spread"]
    assert len(set(numbers["real"]["runs"])) == 1 and numbers["real"]["spread"] > 0


@pytest.mark.parametrize("slides", [2, 6])
def test_the_error_of_usefulness_is_how_much_other_slides_would_differ(slides):
    def held_out(seed):
        """Patches of ``slides`` slides of each label, those of one slide all much alike."""
        groups = np.char.add(LABELS, (np.arange(180) % slides).astype(str))
        common = np.random.default_rng(seed).normal(0, 1.5, (3 * slides, 8))[np.unique(groups, return_inverse=True)[1]]
        part = labelled(seed, 1.0)
        return Labelled((part.features + common).astype(np.float32), LABELS, groups)

    train = labelled(0)
    classifier = Classifier(train)
    accuracies = [
        balanced_accuracy(confusion(part.labels, classifier.predict(part.features), classifier.classes))
        for part in map(held_out, range(100, 160))
    ]
    spreads = [utility_section(train, held_out(seed), train, 0).numbers["real"]["spread"] for seed in range(100, 106)]
    assert np.mean(spreads) == pytest.approx(np.std(accuracies), rel=0.35)


@pytest.mark.parametrize("lonely", [["gleason3"], ["benign", "gleason3", "gleason4"]])
def test_no_gain_is_told_from_one_held_out_slide_of_a_label(lonely):
    train, held_out, fake = labelled(0, 3.0), labelled(1, 3.0), labelled(2, 3.0)
    held_out = replace(held_out, groups=np.where(np.isin(LABELS, lonely), LABELS, held_out.groups))
    section = utility_section(train, held_out, fake, 0)
    assert {row["spread"] for row in section.numbers.values()} == {None}
    assert {row[2] for row in section.tables[0].rows} == {"-"} and ", ".join(lonely) in section.tables[0].caption
    assert "not judged" in section.untested[0] and ", ".join(lonely) in section.untested[0]


def test_usefulness_ends_with_many_labels_of_one_slide_each():
    labels = np.repeat([f"label {index:02}" for index in range(30)], 20)
    features = np.random.default_rng(0).normal(0, 1, (600, 4)).astype(np.float32)
    part = Labelled(features, labels, labels)
    assert utility_section(part, part, part, 0).untested


def test_grades_are_not_judged_where_held_out_patches_do_not_show_them():
    train, held_out, fake = labelled(0), labelled(1), labelled(2)
    noise = Labelled(np.random.default_rng(3).normal(0, 1, fake.features.shape).astype(np.float32), fake.labels, fake.groups)
    shuffled = replace(held_out, labels=np.random.default_rng(0).permutation(LABELS))
    section = grades_section(train, shuffled, noise)
    assert section.findings == [] and "was not judged" in section.untested[0]
    assert grades_section(train, held_out, noise).findings != []
    few = held_out.take(np.r_[0:60, 60:63])
    assert "was not tested" in grades_section(train, few, noise).untested[0]


def test_grades_compare_the_labels_that_all_sets_have():
    train, held_out, fake = labelled(0), labelled(1), labelled(2)
    numbers = grades_section(train, held_out.take(LABELS != "gleason4"), fake).numbers
    assert {tuple(part["classes"]) for part in numbers.values()} == {("benign", "gleason3")}


def test_guesses_of_whole_slides_seldom_exceed_what_guessing_reaches():
    slides, draws = np.array([2, 1, 1, 2]), np.random.default_rng(0)
    right = [draws.binomial(count, 0.25, 10_000) / count for count in slides]
    assert (np.mean(right, axis=0) > guessing(slides)).mean() < 0.03


def test_unlabelled_images_leave_the_questions_open():
    bare = Labelled(labelled(2).features, np.array([""] * 180), np.arange(180).astype(str))
    for section in (grades_section(labelled(0), labelled(1), bare), utility_section(labelled(0), labelled(1), bare, 0)):
        assert section.findings == [] and section.numbers == {} and "not tested" in section.untested[0]


def test_too_few_images_are_not_compared():
    part = labelled(0)
    whole = Side(part.features, part.groups)
    assert compare(Pair(Side(part.features[:5], part.groups[:5]), whole), 5, 0) is None
    one_slide = compare(Pair(Side(labelled(1).features, np.array(["s"] * 180)), whole), 180, 0)
    assert one_slide["kid_se"] > 0 and one_slide["fid_biased"] and one_slide["one_slide"]
    nearly = compare(Pair(Side(labelled(1).features, np.array(["s"] * 179 + ["t"])), whole), 180, 0)
    assert nearly["one_slide"] and not compare(Pair(whole, whole), 180, 0)["one_slide"]


def test_a_table_of_too_few_images_names_no_number_of_them():
    train, held_out, fake = (as_images(labelled(seed)) for seed in range(3))
    few = fake.take(np.arange(0, 180, 10))
    space = FeatureSets("net", labelled(0).features, labelled(1).features, labelled(2).features[::10])
    by_label = quality_section(train, held_out, few, [space], 0).tables[1]
    assert by_label.caption == "By label, features of net; precision to coverage from 60 of each"
    tiny = [part.take(np.arange(0, 180, 10)) for part in (train, held_out, fake)]
    space = FeatureSets("net", *(labelled(seed).features[::10] for seed in range(3)))
    tables = quality_section(*tiny, [space], 0).tables
    assert [table.caption for table in tables] == ["All images, features of net", "By label, features of net"]


def test_distances_come_for_each_label_with_their_floor():
    train, held_out, fake = labelled(0), labelled(1), labelled(2)
    space = FeatureSets("net", train.features, held_out.features, fake.features)
    section = quality_section(*(as_images(part) for part in (train, held_out, fake)), [space], 0)
    assert set(section.numbers["net"]["label"]) == set(LABELS)
    assert section.numbers["net"]["label"]["benign"]["floor: training against held-out"]["n_compared"] == 60
    assert section.numbers["net"]["provider"] == {}


def test_a_table_has_one_number_of_images_and_a_provider_its_own_images():
    train, held_out, fake = (as_images(labelled(seed)) for seed in range(3))
    hospitals = np.array(["karolinska", "radboud"])[np.arange(180) % 2]
    train, held_out = (replace(part, providers=hospitals) for part in (train, held_out))
    space = FeatureSets("net", labelled(0).features, labelled(1).features[:100], labelled(2).features)
    sets = train, held_out.take(np.arange(100)), fake
    section = quality_section(*sets, [space], 0)
    assert {row["n_equal"] for row in section.numbers["net"]["all"].values()} == {100}
    assert "precision to coverage from 100 of each" in section.tables[0].caption
    assert section.summary[0].startswith("KID x1000 against held-out slides: ") and "the floor" in section.summary[0]
    unnamed = section.numbers["net"]["provider"]["radboud"]
    assert unnamed["generated of no known provider against held-out"]["n_compared"] == 180
    assert unnamed["floor: training against held-out"]["n_real"] == 50
    labels = np.char.add(np.char.add(LABELS, "-"), np.repeat(["radboud", "karolinska"], [120, 60]))
    named = quality_section(*sets[:2], replace(fake, labels=labels), [space], 0).numbers["net"]["provider"]
    for provider, count in (("radboud", 120), ("karolinska", 60)):
        assert named[provider]["generated against held-out"]["n_compared"] == count
    assert {row["n_equal"] for pair in named.values() for row in pair.values()} == {50}


def test_drawn_labels_keep_the_real_proportions():
    def sample(count, seed, label):
        return np.full((count, 4, 4, 3), len(label), np.uint8)

    drawn = draw_set(sample, ["benign", "gleason3", "unlabelled"], ["benign"] * 6 + ["gleason3"] * 3 + ["unlabelled"], 20, 0)
    assert dict(zip(*np.unique(drawn.labels, return_counts=True), strict=True)) == {"": 2, "benign": 12, "gleason3": 6}
    assert (drawn.images[drawn.labels == "gleason3"] == 8).all()
    assert len(draw_set(lambda count, seed: np.zeros((count, 4, 4, 3), np.uint8), [], [], 5, 0)) == 5


def test_drawn_images_without_a_label_keep_their_hospital():
    names = ["gleason4-radboud", "unlabelled-karolinska"]
    drawn = draw_set(lambda count, seed, label: np.zeros((count, 4, 4, 3), np.uint8), names, names, 20, 0)
    assert drawn.labels.tolist() == ["gleason4-radboud"] * 10 + [""] * 10
    assert drawn.providers.tolist() == ["radboud"] * 10 + ["karolinska"] * 10


@pytest.mark.parametrize("name", ["unlabelled", "unlabelled-radboud", "unlabelled-ours", "unknown-karolinska", "unconditional"])
def test_names_that_say_no_label(name):
    assert known(name) == ""


def test_names_of_peoples_own_are_labels_and_no_hospitals():
    for name in ("gleason-3", "non-tumor", "unknown-primary", "isup_low"):
        assert known(name) == name and provider_in(name) == ""
    assert provider_in("gleason4-radboud") == "radboud" and provider_in("isup3-ours", ["ours"]) == "ours"


def test_choose_draws_without_replacement():
    assert len(set(choose(100, 30, 1))) == 30 and (choose(100, 30, 1) == choose(100, 30, 1)).all()
    assert (choose(5, 30, 1) == np.arange(5)).all()


def test_an_unreadable_image_is_named(tmp_path):
    def decode(path, size):
        raise OSError("broken")

    def bomb(path, size):
        raise Image.DecompressionBombError("too large")

    for failing, why in ((decode, "broken"), (bomb, "too large")):
        with pytest.raises(UserError, match=rf"bad\.png.*{why}"):
            read_images([tmp_path / "bad.png"], failing, 8, "read")


def test_the_side_of_a_picture_that_declares_too_much_is_one_sentence(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    assert side_of(tmp_path / "x.png", tmp_path / "x.png") == 30
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"x\.png is not a readable image"):
        side_of(tmp_path / "x.png", tmp_path / "x.png")


def test_the_report_escapes_and_its_json_is_strict(tmp_path):
    finding = Finding("test", "<b>bold</b>", float("nan"), np.float32(1.5))
    section = Section(
        "part", "Part", "text", {"x": np.inf, "y": [np.int64(3)]}, [Table("caption", ["a"], [["<i>"]])], [], [finding]
    )
    settings = {"generated": "g", "number generated": "3", "compared at": "8 x 8 pixels"}
    write_report(tmp_path, "title", settings, ["a note"], [section])
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["part"] == {"x": None, "y": [3]} and record["findings"][0]["limit"] == 1.5
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;bold" in page and "<b>bold" not in page and "a note" in page and "http" not in page
