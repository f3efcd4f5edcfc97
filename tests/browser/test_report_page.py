"""A report opens from disk without a network."""

from playwright.sync_api import expect

import kermes.report
from kermes import cli


def test_a_report_opens_from_disk_with_the_network_off(made, browser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["report", str(made / "out"), "--worst", "3", "-o", "page.html", "--coadd", str(made / "scene.npz")]
    assert cli.run(words) == 0
    context = browser.new_context(offline=True)
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
    )
    page.goto((tmp_path / "page.html").as_uri())
    worst = kermes.report.worst_objects(kermes.open(made / "out"), 3)
    for number in worst:
        expect(page.locator(f"#object-{number}")).to_be_visible()
    # One of the area, and one of each object.
    widths = page.evaluate("[...document.images].map((image) => image.complete && image.naturalWidth)")
    assert len(widths) == 4
    assert all(width > 500 for width in widths)
    page.locator("summary").first.click()
    expect(page.locator("details").first).to_contain_text("full")
    assert wrong == []
    context.close()
