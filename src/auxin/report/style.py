"""The style sheet: one accent, numerals that line up, light and dark."""

STYLE = """
:root{--paper:#fcfcfa;--ink:#1b2023;--soft:#586168;--rule:#e3e5e1;--mark:#aab0ac;--line:#8a9298;
--accent:#078058;--wash:rgba(7,128,88,.09);--original:#8a9298;
--shade0:#0b4f39;--shade1:#0b6146;--shade2:#0b7350;--shade3:#198a63;--shade4:#279a72;--shade5:#2aa075}
@media (prefers-color-scheme:dark){:root{--paper:#14181a;--ink:#e6e9e7;--soft:#a3acb0;--rule:#2a3134;
--mark:#59635f;--line:#7f898e;--accent:#5fcfa2;--wash:rgba(95,207,162,.1);--original:#7f898e;
--shade0:#2f8a68;--shade1:#3c9c78;--shade2:#4bb088;--shade3:#5fc39b;--shade4:#7fd6b2;--shade5:#a3e8cb}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:72px 40px 96px}
h1{font-size:34px;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0;overflow-wrap:anywhere}
h2{font-size:20px;line-height:1.3;font-weight:650;margin:0}
section{margin-top:72px}
.lead{font-size:19px;line-height:1.5;max-width:44em;margin:14px 0 0;overflow-wrap:anywhere}
.note{color:var(--soft);font-size:14.5px;margin:4px 0 0;max-width:60em;overflow-wrap:anywhere}
.figures{display:flex;flex-wrap:wrap;gap:24px 48px;margin:40px 0 0;padding:0}
.figures dt{color:var(--soft);font-size:14px}
.figures dd{margin:2px 0 0;font-size:22px;line-height:1.3;font-weight:600;white-space:nowrap}
.plot{margin-top:20px;padding:0 16px 0 52px}
.plot.labelled{padding-right:96px}
.plot.small{padding:0 8px 0 48px;margin-top:8px}
svg{display:block;overflow:visible}
text{fill:var(--soft);font-size:12.5px}
.grid{stroke:var(--rule);stroke-width:1}
.mark{stroke:var(--mark);stroke-width:1;stroke-dasharray:3 3}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.loss,.line.history{stroke:var(--line);stroke-width:1.25}
.line.validation,.line.forecast{stroke:var(--accent)}
.line.actual{stroke:var(--ink);stroke-width:1.25}
.line.forecast{stroke-width:2.5}
.area{fill:var(--wash)}
.dot.loss{fill:var(--line)}
.dot.validation{fill:var(--accent)}
.end{font-size:13.5px}
.end.validation{fill:var(--accent);font-weight:600}
.number{fill:var(--accent);font-weight:650}
.path{fill:var(--ink);font-size:13px;paint-order:stroke;stroke:var(--paper);stroke-width:4px;
stroke-linejoin:round}
.bar.original,.swatch.original{fill:var(--original);background:var(--original)}
.shade0{fill:var(--shade0);background:var(--shade0)}
.shade1{fill:var(--shade1);background:var(--shade1)}
.shade2{fill:var(--shade2);background:var(--shade2)}
.shade3{fill:var(--shade3);background:var(--shade3)}
.shade4{fill:var(--shade4);background:var(--shade4)}
.shade5{fill:var(--shade5);background:var(--shade5)}
.branch{stroke:var(--ink);stroke-width:1}
.branch-dot{fill:var(--ink)}
.key{display:flex;flex-wrap:wrap;gap:4px 24px;margin:10px 0 0;font-size:14px;color:var(--soft)}
.swatch{display:inline-block;width:20px;height:0;border-top:2px solid;margin-right:8px;vertical-align:middle}
.swatch.block{width:14px;height:10px;border:0;margin-right:8px}
.ramp .swatch.block{margin:0}
.swatch.loss,.swatch.history{border-color:var(--line)}
.swatch.validation,.swatch.forecast{border-color:var(--accent)}
.swatch.actual{border-color:var(--ink)}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(280px,100%),1fr));
gap:32px 40px;margin-top:24px}
figure{margin:0;min-width:0}
figcaption{font-size:14.5px;line-height:1.4;overflow-wrap:anywhere}
figcaption strong{display:block;font-weight:600}
.scroll{overflow-x:auto;margin-top:4px}
.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:4px}
table{border-collapse:collapse;width:100%;font-size:14.5px;line-height:1.45}
caption{text-align:left;color:var(--soft);padding:0 0 12px}
caption span{display:block;max-width:min(60em,100vw - 32px)}
th,td{text-align:left;vertical-align:top;padding:9px 24px 9px 0;font-weight:400;
border-top:1px solid var(--rule)}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--soft);font-size:13.5px;vertical-align:bottom;border-top:0}
tbody th{font-weight:600}
.n{text-align:right;white-space:nowrap}
td,th{max-width:24em;overflow-wrap:break-word}
code{font:13.5px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
abbr{text-decoration:none}
.sub{display:block;color:var(--soft);font-size:13.5px}
@media (min-width:721px){.narrow{display:none}}
@media (max-width:720px){.wide{display:none}
main{padding:36px 16px 64px}
section{margin-top:56px}
h1{font-size:26px}
table{width:max-content;min-width:100%}
.lead{font-size:17px}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px 16px;margin-top:28px}
.figures dd{font-size:18px;white-space:normal}
.plot,.plot.labelled{padding:0 10px 0 44px}}
@media print{main{max-width:none;padding:0}section{break-inside:avoid}.scroll{overflow:visible}}
"""
