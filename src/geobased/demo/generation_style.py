"""Style of the text generation page, in Gradio's own colours, so that it is light or dark with the page."""

STYLE = """
.gradio-container { --based: #1d4ed8; --attention: #c2410c; --mark: #fde68a; }
.dark .gradio-container, .dark { --based: #60a5fa; --attention: #fb923c; --mark: #854d0e; }
.gradio-container table { width: 100%; border-collapse: collapse; margin: 0; }
.gradio-container table, .gradio-container table tr { border: 0 !important; }
.recall table { font-size: 0.875rem; }
.gradio-container table td, .gradio-container table th {
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; text-align: left;
}
.gradio-container .head { display: grid !important; grid-template-columns: 1fr auto; }
.gradio-container .head label { display: contents; }
.gradio-container .head .info-text { grid-column: 1 / -1; order: 2; }
.scrolls { overflow-x: auto; }
.comparison, .recall { color: var(--body-text-color); display: grid; grid-template-columns: minmax(0, 1fr); gap: 0.75rem; }
.html-container:has(> * > .comparison, > * > .recall) { padding: 0; }
.recall table td:nth-child(2) { white-space: normal !important; }
.comparison p, .recall p { margin: 0; }
.comparison .status, .recall .answer { font-size: 1.1rem; font-weight: 600; }
.side-by-side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0.75rem; }
.card, .comparison figure, .document {
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
  border-radius: var(--block-radius); padding: 0.75rem 1rem; margin: 0; min-width: 0;
}
.card { border-top: 4px solid var(--line); display: flex; flex-direction: column; gap: 0.4rem; }
.card.based { --line: var(--based); }
.card.attention { --line: var(--attention); }
.card h3 { margin: 0; font-size: 1rem; font-weight: 600; color: var(--line); overflow-wrap: anywhere; }
.card .note { font-size: 0.85rem; color: var(--block-info-text-color); }
.card .text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto; }
.card progress { width: 100%; height: 0.4rem; border: 0; background: var(--border-color-primary); appearance: none; }
.card progress::-webkit-progress-bar { background: var(--border-color-primary); }
.card progress::-webkit-progress-value { background: var(--line); }
.card progress::-moz-progress-bar { background: var(--line); }
.card dl { display: grid; grid-template-columns: 1fr 1fr; gap: 0.5rem; margin: 0.25rem 0; }
.card dl div { min-width: 0; }
.card dt { font-size: 0.8rem; color: var(--block-info-text-color); }
.card dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.comparison figcaption, .recall .label { font-size: 0.85rem; font-weight: 600; margin-bottom: 0.25rem; }
.comparison .key { font-weight: 400; margin-right: 1rem; }
.comparison .key::before {
  content: ""; display: inline-block; width: 1rem; height: 0.2rem; margin-right: 0.35rem; vertical-align: 0.25em;
}
.comparison .key.based::before { background: var(--based); }
.comparison .key.attention::before { background: var(--attention); }
.comparison svg { display: block; width: 100%; height: auto; font-size: 12px; }
.comparison svg text { fill: var(--block-info-text-color); }
.comparison svg .grid { stroke: var(--border-color-primary); stroke-width: 1; }
.comparison svg polyline { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.comparison svg polyline.based { stroke: var(--based); }
.comparison svg polyline.attention { stroke: var(--attention); }
.comparison svg circle.based { fill: var(--based); }
.comparison svg circle.attention { fill: var(--attention); }
.document { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto; }
.document mark { background: var(--mark); color: inherit; padding: 0 0.15em; border-radius: 0.2em; }
"""
