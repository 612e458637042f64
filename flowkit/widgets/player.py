"""A view as a page by itself: one HTML file that plays its frames with no server and no request to anywhere."""
import base64
import html
import json

from . import scene
from .view import HERE

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<link rel="icon" href="data:,"><title>{title}</title>
<style>{css}
html, body {{ margin: 0; height: 100%; background: #fff; }}
@media (prefers-color-scheme: dark) {{ html, body {{ background: #14161b; }} }}
.flowkit-view {{ padding: 6px 12px; font-size: clamp(18px, 1.25vw, 26px); }}
</style></head><body><script type="module">
{code}
const data = {data};
data.picture.arrays = data.picture.arrays.map(words => {{
  const bytes = Uint8Array.from(atob(words), letter => letter.charCodeAt(0));
  return new DataView(bytes.buffer);
}});
const view = mount(document.body, {{ ...data, alone: true }});
document.querySelector(".flowkit-canvas").focus();
</script></body></html>
"""


def page(view, count=90):
    """The HTML text of a page that plays `view`: its frames, or a walk of its first control in `count` steps."""
    frames, arrays = scene.pack(view.recorded(count))
    data = {"title": view.canvas.title, "caption": view.canvas.caption,
            "picture": {"frames": frames, "arrays": [base64.b64encode(a).decode() for a in arrays], "rate": view.rate, "stride": view.stride}}
    # "</script>" within the data would end the script: in JSON a slash may be escaped.
    code = (HERE / "canvas.mjs").read_text().replace("export default { render };", "").replace("export function", "function")
    return _PAGE.format(title=html.escape(view.canvas.title), css=(HERE / "canvas.css").read_text(), code=code,
                        data=json.dumps(data).replace("</", "<\\/"))
