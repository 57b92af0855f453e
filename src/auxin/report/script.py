"""The page's script: pointer and arrow keys read a chart's values. Without it everything else still works.

Written without the characters that HTML or XML would read as markup.
"""

import base64
import hashlib

SCRIPT = """
(function () {
  "use strict";
  var units = {step: "step ", flops: "", seconds: "", call: "call "};
  function words(key, value) {
    if (value === null) { return "not finite or not measured"; }
    if (key === "flops") { return value.toExponential(2).replace("e+", "e") + " FLOP"; }
    if (key === "seconds") { return value.toLocaleString("en") + " s"; }
    return value.toLocaleString("en", {maximumSignificantDigits: 4, useGrouping: true});
  }
  function place(axis, value) { return Math.min(1, Math.max(0, (value - axis[1]) / (axis[2] - axis[1]))); }
  function setUp(script) {
    var data = JSON.parse(script.textContent), name = script.getAttribute("data-for");
    var readout = document.getElementById(name + "-readout"), at = -1;
    function show(plot, axis, column, next) {
      at = Math.min(data.rows.length - 1, Math.max(0, next));
      var row = data.rows[at], svg = plot.querySelector("svg"), line = svg.querySelector(".cursor");
      if (line === null) {
        line = document.createElementNS(svg.namespaceURI, "line");
        line.setAttribute("class", "cursor");
        var frame = svg.querySelector("svg");
        line.setAttribute("y1", frame.getAttribute("y"));
        line.setAttribute("y2", Number(frame.getAttribute("y")) + Number(frame.getAttribute("height")));
        svg.appendChild(line);
      }
      var x = 100 * place(axis, row[column]) + "%";
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      readout.textContent = data.names.map(function (label, index) {
        var key = data.axes[index] ? label : "value";
        return key === "value" ? label + " " + words(key, row[index]) : units[key] + words(key, row[index]);
      }).join(", ");
    }
    data.axes.forEach(function (axis, column) {
      var plot = document.getElementById(name + "-" + axis[0]);
      if (plot === null || data.rows.length === 0) { return; }
      plot.tabIndex = 0;
      plot.setAttribute("role", "group");
      plot.setAttribute("aria-label", "Chart. The arrow keys read its values.");
      plot.addEventListener("keydown", function (event) {
        var steps = {ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20, Home: -1e9, End: 1e9};
        if (steps[event.key] === undefined) { return; }
        event.preventDefault();
        show(plot, axis, column, at + steps[event.key]);
      });
      plot.addEventListener("pointermove", function (event) {
        var box = plot.querySelector("svg").getBoundingClientRect(), best = 0, distance = 9;
        var target = (event.clientX - box.left) / box.width;
        data.rows.forEach(function (row, index) {
          var away = row[column] === null ? 9 : Math.abs(place(axis, row[column]) - target);
          if (distance > away) { distance = away; best = index; }
        });
        show(plot, axis, column, best);
      });
    });
  }
  document.querySelectorAll("script.data").forEach(setUp);
  var first = document.querySelector(".readout");
  if (first !== null) {
    first.textContent = "Point at a chart, or focus it and press the arrow keys, to read its values.";
  }
}());
"""

FINGERPRINT = "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
