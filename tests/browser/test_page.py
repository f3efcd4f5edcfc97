"""The page in a real browser: what a reader does, and what is then on the screen."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

import kermes
from kermes import cli

LOADED = """() => Object.values(window.kermes.items).every((item) => !item.opacity || item.getFullyLoaded())"""


def open_page(page, address):
    page.goto(address)
    page.wait_for_selector("body[data-ready=yes]")
    settle(page)


def settle(page):
    """Wait until nothing moves any more, which the address then says, and all tiles are on the screen."""
    address = None
    while page.url != address:
        address = page.url
        page.wait_for_timeout(600)  # the time of an animation, and of writing the address after it
    page.wait_for_function(LOADED)
    page.wait_for_timeout(100)


def picture(page):
    """What is seen of the picture, without marks and legend, shape (h, w, 3)."""
    page.evaluate(
        "for (const id of ['marks', 'legend', 'place']) document.getElementById(id).style.visibility = 'hidden'"
    )
    shot = page.locator("#osd").screenshot()
    page.evaluate("for (const id of ['marks', 'legend', 'place']) document.getElementById(id).style.visibility = ''")
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def screen_of(page, object_id):
    """Where an object is on the screen."""
    return page.evaluate(
        """(id) => {
          const row = window.kermes.table.getRows().map((each) => each.getData()).find((each) => each.object_id === id);
          const { x, y, scale } = window.kermes.onScreen();
          const [px, py] = window.kermes.toPicture(row.y, row.x);
          const { left, top } = document.getElementById("osd").getBoundingClientRect();
          return [left + x + px * scale, top + y + py * scale];
        }""",
        object_id,
    )


def type_filter(page, column, text):
    page.locator(f".tabulator-col[tabulator-field={column}] input").press_sequentially(text, delay=20)


def columns(*names):
    return "columns=" + ",".join(("object_id", "y", "x", *names))


def test_the_page_opens_with_picture_table_and_legend(serve, page):
    server = serve()
    open_page(page, server.address)
    expect(page.locator("#count")).to_have_text("39 objects")
    expect(page.locator("#legend")).to_contain_text("full: 39")
    assert page.title() == "out"
    assert page.locator(".tabulator-row").count() > 5
    middle = picture(page)[200:300, 350:550]
    assert middle.std() > 5  # there is sky with objects on it


def test_layers_are_what_they_say(serve, page):
    open_page(page, serve().address)
    seen = {}
    for layer in ("image", "model", "residual"):
        page.click(f"[data-layer={layer}]")
        settle(page)
        seen[layer] = picture(page)
        assert page.locator(f"[data-layer={layer}]").get_attribute("class") == "on"
    area = (slice(100, 400), slice(300, 600))
    # The model has no noise: what differs from one pixel of the screen to the next is much less than in the image.
    rough = {layer: np.abs(np.diff(image[area], axis=1)).mean() for layer, image in seen.items()}
    assert rough["model"] < 0.5 * rough["image"] < rough["residual"]
    assert seen["residual"][area].mean() > 150  # white where nothing is left
    page.keyboard.press("1")
    settle(page)
    np.testing.assert_array_equal(picture(page), seen["image"])


def test_blinking_shows_image_and_model_in_turn(serve, page):
    open_page(page, serve().address)
    page.keyboard.press("b")
    page.wait_for_timeout(300)
    page.wait_for_function("() => window.kermes.items.model.getFullyLoaded()")
    fronts = set()
    for _ in range(12):
        fronts.add(page.evaluate("['image', 'model'].filter((name) => window.kermes.items[name].opacity).join()"))
        page.wait_for_timeout(200)
    assert fronts == {"image", "model"}


def test_zoom_and_pan_are_in_the_address_and_a_link_opens_the_same_view(serve, page, browser):
    server = serve()
    open_page(page, server.address + "#" + columns("chi2"))
    box = page.locator("#osd").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    for _ in range(3):
        page.mouse.wheel(0, -400)
        page.wait_for_timeout(100)
    page.mouse.down()
    page.mouse.move(box["x"] + 380, box["y"] + 260, steps=4)
    page.mouse.up()
    page.click("[data-layer=residual]")
    page.select_option("#color", "chi2")
    page.check("#footprints")
    settle(page)
    link, seen = page.url, picture(page)
    assert "layer=residual" in link
    assert "color=chi2" in link
    other = browser.new_page(viewport=page.viewport_size)
    open_page(other, link)
    again = picture(other)
    # The place in the address is rounded, which can move an edge of a pixel by one on the screen, here and there.
    assert (np.abs(again - seen).max(axis=2) > 30).mean() < 0.01
    expect(other.locator("#footprints")).to_be_checked()
    expect(other.locator("#legend")).to_contain_text("chi2")
    other.close()


def test_a_filter_is_on_table_picture_and_address(serve, page, made):
    server = serve()
    open_page(page, server.address + "#" + columns("model"))
    objects = kermes.open(made / "out").objects
    points = set(objects["object_id"][objects["model"] == "point"].tolist())
    type_filter(page, "model", "point")
    expect(page.locator("#count")).to_have_text(f"{len(points)} of 39 objects")
    page.wait_for_function(
        "(ids) => window.kermes.table.getData().map((row) => row.object_id).join() === ids",
        arg=",".join(map(str, sorted(points))),
    )
    page.wait_for_timeout(300)
    assert json.loads(page.evaluate("new URLSearchParams(location.hash.slice(1)).get('filter')")) == {"model": "point"}
    type_filter(page, "object_id", "<= 5")
    expect(page.locator("#count")).to_have_text(f"{len([n for n in points if n <= 5])} of 39 objects")
    page.click("#clear-filters")
    expect(page.locator("#count")).to_have_text("39 objects")


def test_half_a_condition_is_explained(serve, page):
    open_page(page, serve().address)
    type_filter(page, "chi2", "> x")
    expect(page.locator("#message")).to_contain_text("filter of chi2 must be like > 3")
    page.wrong.clear()  # the browser notes the refused request


def test_sorting_takes_all_objects(serve, page, made):
    open_page(page, serve().address)
    page.click(".tabulator-col[tabulator-field=chi2] .tabulator-col-title")
    page.wait_for_timeout(300)
    page.click(".tabulator-col[tabulator-field=chi2] .tabulator-col-title")
    objects = kermes.open(made / "out").objects
    top = page.locator(".tabulator-row").first
    expect(top.locator("[tabulator-field=chi2]")).to_have_text(f"{objects['chi2'].max():.4g}")
    page.wait_for_timeout(300)
    chi2 = page.evaluate("window.kermes.table.getData().map((row) => row.chi2)")
    assert chi2 == sorted(chi2, reverse=True)
    assert "descending=yes" in page.url


def test_a_click_in_the_picture_and_one_in_the_table_show_the_object(serve, page):
    open_page(page, serve().address + "#" + columns("chi2"))
    page.mouse.click(*screen_of(page, 7))
    expect(page.locator("#side h2")).to_contain_text("Object 7")
    expect(page.locator("#side img")).to_be_visible()
    page.wait_for_function("() => document.querySelector('#side img').naturalWidth > 300")
    expect(page.locator("#side")).to_contain_text("blendedness")
    expect(page.locator(".tabulator-row.chosen [tabulator-field=object_id]")).to_have_text("7")
    page.locator(".tabulator-row", has=page.locator("[tabulator-field=object_id]", has_text="12")).first.click()
    expect(page.locator("#side h2")).to_contain_text("Object 12")
    settle(page)
    x, y = screen_of(page, 12)
    box = page.locator("#osd").bounding_box()
    assert abs(x - box["x"] - box["width"] / 2) < 3
    assert abs(y - box["y"] - box["height"] / 2) < 3


def test_places_are_found(serve, page):
    open_page(page, serve().address)
    page.fill("#find-text", "7")
    page.press("#find-text", "Enter")
    expect(page.locator("#side h2")).to_contain_text("Object 7")
    page.fill("#find-text", "y=100 x=40")
    page.press("#find-text", "Enter")
    settle(page)
    page.wait_for_timeout(300)
    words = page.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
    assert float(words["y"]) == pytest.approx(100, abs=0.2)
    assert float(words["x"]) == pytest.approx(40, abs=0.2)


def test_what_is_under_the_mouse_is_told(serve, page, made):
    open_page(page, serve().address + "#y=80&x=60&width=40")
    box = page.locator("#osd").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#place")).to_contain_text("y 80.0 x 60.0")
    value = float(np.load(made / "scene.npz")["images"][3, 80, 60])
    expect(page.locator("#place")).to_contain_text(f"i {float(f'{value:.4g}'):g}")


def test_columns_are_added_and_taken_away(serve, page):
    open_page(page, serve().address)
    page.fill("#add-column", "i_blendedness")
    page.press("#add-column", "Enter")
    expect(page.locator(".tabulator-col[tabulator-field=i_blendedness]")).to_be_attached()
    page.wait_for_function("() => typeof window.kermes.table.getData()[0]?.i_blendedness === 'number'")
    page.wait_for_timeout(300)
    assert "i_blendedness" in page.url


def test_without_images_the_models_are_shown(serve, page):
    open_page(page, serve(coadd=False).address)
    assert not page.locator("[data-layer=image]").is_visible()
    assert not page.locator("[data-layer=residual]").is_visible()
    seen = picture(page)[100:400, 300:600]
    assert seen.max() > 200
    assert np.median(seen) < 60


def test_a_read_only_view_has_no_editor_and_refuses_edits(serve, page):
    server = serve()
    open_page(page, server.address + "#object=3")
    expect(page.locator("#side h2")).to_contain_text("Object 3")
    assert page.locator("#editor").count() == 0
    answer = page.evaluate(
        """async () => {
          const { run } = await (await fetch("api/result")).json();
          const answer = await fetch("api/refit", { method: "POST", headers: { "X-Kermes": run }, body: "{}" });
          return [answer.status, (await answer.json()).error];
        }"""
    )
    assert answer == [403, "this view is read-only: start it with --edit"]
    page.wrong.clear()


def test_refit_after_adding_a_peak(serve, page, tmp_path, made):
    server = serve("--edit")
    before = {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()}
    open_page(page, server.address + "#object=7&" + columns("chi2"))
    expect(page.locator("#editor")).to_be_visible()
    page.click("#editor button:has-text('Add peak')")
    x, y = screen_of(page, 7)
    page.mouse.click(x + 25, y - 15)
    expect(page.locator("#editor li")).to_contain_text("new peak at y =")
    page.click("#editor button:has-text('Refit')")
    expect(page.locator("#comparison h3").last).to_contain_text("after: χ²", timeout=60_000)
    expect(page.locator("#count")).to_have_text("40 objects")
    for side in ("before", "after"):
        assert page.evaluate(f"document.querySelector('#comparison img[alt={side}]').naturalWidth") > 300
    kept = json.loads((tmp_path / "out_edits.json").read_text())["edits"]
    assert len(kept) == 1
    assert len(kept[0]["add"]) == 1
    # The result itself is as it was.
    assert {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()} == before

    page.click("#editor button:has-text('Write result')")
    expect(page.locator("#message")).to_contain_text("out_edited.kermes")
    # It says what it was made from, like a result of kermes refit.
    assert cli.run(["show", str(tmp_path / "out_edited.kermes"), "-o", str(tmp_path / "picture.png")]) == 0
    edited = kermes.open(tmp_path / "out_edited.kermes")
    assert len(edited) == 40
    assert len(edited.notes["history"]) == 1

    # Taken up again the next time, and taken back.
    server.close()
    again = serve("--edit", folder=tmp_path)
    assert any("1 edit taken up" in line for line in again.said)
    open_page(page, again.address + "#object=7")
    expect(page.locator("#count")).to_have_text("40 objects")
    page.click("#editor button:has-text('Undo last')")
    expect(page.locator("#count")).to_have_text("39 objects", timeout=60_000)
    assert json.loads((tmp_path / "out_edits.json").read_text())["edits"] == []


def test_a_refit_that_fails_says_why(serve, page, tmp_path):
    open_page(page, serve("--edit").address + "#object=3")
    page.fill("#settings", "nothing=1")
    page.press("#settings", "Enter")
    page.click("#editor button:has-text('Refit')")
    expect(page.locator("#message")).to_contain_text("nothing")
    assert not (tmp_path / "out_edits.json").exists()
    page.wrong.clear()
