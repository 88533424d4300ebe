"""How the geolocalization page looks beyond its maps."""

PAGE_CSS = """
.gradio-container{max-width:72rem!important}
.gradio-container h1{font-size:1.9rem;letter-spacing:-.01em;margin:.5rem 0 .25rem}
.gradio-container .html-container{padding:0!important}
.gradio-container .places{contain:inline-size}
.hint{font-size:.88em;opacity:.8}
.places.rows{max-height:26rem;overflow:auto;border:1px solid var(--line);border-radius:6px;padding:0 .75rem}
.places.rows table{overflow:visible;margin:0;width:100%;display:table}
.places.rows thead th{position:sticky;top:0;background:var(--body-background-fill)}
.places.rows th:first-child,.places.rows td:first-child,.places.rows th:nth-child(2),.places.rows td:nth-child(2){text-align:left;
white-space:normal!important;overflow-wrap:anywhere}
.places.rows .failed td{color:var(--quiet)}
.hidden-parts{height:0!important;min-height:0!important;overflow:hidden;border:0!important}
.places.tree li{font-size:1rem}
@media (max-width:640px){.gradio-container .row{flex-wrap:wrap}.gradio-container .row>*{flex:1 1 100%!important}
.gradio-container .row.keep>*{flex:1 1 0!important}.gradio-container .main{padding-inline:.75rem!important}
.places table{font-size:.88em}
.places th,.places td{padding-inline:.35rem!important;white-space:normal!important}
.places th:nth-child(2),.places td:nth-child(2){min-width:5rem}}
.notice{border-left:4px solid #bf8700;padding:.1rem .9rem!important;font-size:.92em}
.status:empty,.status:not(:has(*)){display:none}
.status{font-size:1.05em}
.places .empty{margin:0;padding:2.5rem 1rem;text-align:center;border:1px dashed var(--line);border-radius:6px}
.places.tree ul{list-style:none;margin:0;padding-left:1.1rem}
.places.tree>ul{padding-left:0}
.places.tree li{margin:.2rem 0}
.places.tree summary{cursor:pointer}
.places.tree b{font-variant-numeric:tabular-nums;margin-left:.35rem}
.places.wide td,.places.wide th{text-align:left;white-space:normal!important}
.places.wide td:last-child,.places.wide th:last-child{text-align:right;white-space:nowrap!important}
.places.numbers td:nth-child(2),.places.numbers th:nth-child(2){text-align:right;min-width:0}
.places.numbers td:first-child,.places.numbers th:first-child{text-align:left}
.places.heat .pictures{display:flex;flex-wrap:wrap;gap:1rem}
.places.heat figure{flex:0 1 20rem}
.places.heat img{width:100%;height:auto}
.places.heat .scale{display:flex;align-items:center;gap:.6rem;margin:.75rem 0;font-size:.9em}
.places.heat .scale i{flex:0 1 12rem;height:.7rem;border-radius:3px;background:linear-gradient(90deg,#0969da,#0969da00 50%,
#d1242f00 50%,#d1242f)}
.globe svg{display:block;width:100%;height:auto;border-radius:6px;cursor:crosshair}
.globe path{fill:#ffd33d33;stroke:#ffd33d;stroke-width:2;vector-effect:non-scaling-stroke}
"""

__all__ = ["PAGE_CSS"]
