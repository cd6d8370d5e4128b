/* A structure on a canvas: drag to turn, arrow keys too; buttons choose structure and arrows. */
(function () {
  "use strict";
  const box = document.getElementById("viewer");
  if (!box) return;
  const data = JSON.parse(document.getElementById("frames").textContent);
  const canvas = box.querySelector("canvas");
  const pen = canvas.getContext("2d");
  const caption = box.querySelector("[data-caption]");
  const rotX = (a) => [1, 0, 0, 0, Math.cos(a), -Math.sin(a), 0, Math.sin(a), Math.cos(a)];
  const rotY = (a) => [Math.cos(a), 0, Math.sin(a), 0, 1, 0, -Math.sin(a), 0, Math.cos(a)];
  const times = (a, b) =>
    a.map((_, i) => [0, 1, 2].reduce((s, k) => s + a[3 * ((i / 3) | 0) + k] * b[3 * k + (i % 3)], 0));
  const home = () => times(rotX(-0.35), rotY(0.52));
  let turn = home(), zoom = 1, frame = data.frames[0], model = "after", arrows = true;

  const apply = (p, i) => [0, 1, 2].map(
    (r) => turn[3 * r] * p[3 * i] + turn[3 * r + 1] * p[3 * i + 1] + turn[3 * r + 2] * p[3 * i + 2]);
  const css = (name) => getComputedStyle(box).getPropertyValue(name).trim();

  function corners() {
    const c = frame.cell, list = [];
    for (let n = 0; n < 8; n++)
      for (let k = 0; k < 3; k++)
        list.push(frame.o[k] + [0, 1, 2].reduce((s, v) => s + (n >> v & 1) * c[3 * v + k], 0));
    return list;
  }

  function radius() {  // of the sphere that holds all there is to see, Å
    let most = 1;
    const all = frame.cell ? frame.x.concat(corners()) : frame.x;
    for (let i = 0; i < all.length; i += 3) most = Math.max(most, Math.hypot(all[i], all[i + 1], all[i + 2]));
    return most + 1.2;
  }

  function line(from, to, width, colour) {
    pen.lineWidth = width; pen.strokeStyle = colour;
    pen.beginPath(); pen.moveTo(from[0], from[1]); pen.lineTo(to[0], to[1]); pen.stroke();
  }

  function draw() {
    const dense = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = width * dense; canvas.height = height * dense;
    pen.setTransform(dense, 0, 0, dense, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.lineCap = "round";
    const unit = zoom * Math.min(width, height) / 2 / radius();
    const place = (p) => [width / 2 + unit * p[0], height / 2 - unit * p[1], p[2]];
    const colours = { bond: css("--bond"), edge: css("--muted"), arrow: css("--warn"), rim: css("--rim") };
    if (frame.cell) {
      const list = corners();
      for (let a = 0; a < 8; a++) for (let v = 0; v < 3; v++)
        if (!(a >> v & 1)) line(place(apply(list, a)), place(apply(list, a | 1 << v)), 1, colours.edge);
    }
    const points = frame.z.map((_, i) => place(apply(frame.x, i)));
    const error = arrows && frame.e[model];
    const things = points.map((p, i) => ({ depth: p[2], paint: () => atom(p, i) }));
    for (let k = 0; k < frame.b.length; k += 2) {
      const a = points[frame.b[k]], b = points[frame.b[k + 1]];
      things.push({ depth: (a[2] + b[2]) / 2 - 0.3, paint: () => line(a, b, Math.max(2, 0.16 * unit), colours.bond) });
    }
    things.sort((a, b) => a.depth - b.depth).forEach((thing) => thing.paint());
    if (error) for (let i = 0; i < points.length; i++) {  // over the atoms: they are what is looked for
      const e = apply(error, i), s = frame.scale * unit;
      arrow(points[i], [points[i][0] + s * e[0], points[i][1] - s * e[1]], colours.arrow);
    }

    function atom(p, i) {
      const [, colour, size] = data.elements[frame.z[i]];
      pen.beginPath(); pen.arc(p[0], p[1], size * unit, 0, 2 * Math.PI);
      pen.fillStyle = colour; pen.fill();
      pen.lineWidth = 1; pen.strokeStyle = colours.rim; pen.stroke();
    }
  }

  function arrow(from, to, colour) {
    const dx = to[0] - from[0], dy = to[1] - from[1], length = Math.hypot(dx, dy);
    if (length < 3) return;
    line(from, to, 2, colour);
    const head = Math.min(8, length / 2), angle = Math.atan2(dy, dx);
    for (const side of [-0.45, 0.45])
      line(to, [to[0] - head * Math.cos(angle + side), to[1] - head * Math.sin(angle + side)], 2, colour);
  }

  function show(index) {
    frame = data.frames[index];
    if (!frame.e[model]) model = Object.keys(frame.e)[0] || model;
    caption.textContent = frame.name + ": " + frame.caption;
    press("[data-frame]", "frame", index);
    draw();
  }

  function press(selector, key, value) {
    document.querySelectorAll(selector).forEach((b) => b.setAttribute("aria-pressed", b.dataset[key] === String(value)));
  }

  function spin(dx, dy) { turn = times(rotX(dy), times(rotY(dx), turn)); draw(); }

  let last = null;
  canvas.addEventListener("pointerdown", (e) => { last = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener("pointermove", (e) => {
    if (!last) return;
    spin((e.clientX - last[0]) * 0.01, (e.clientY - last[1]) * 0.01);
    last = [e.clientX, e.clientY];
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
  canvas.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] }[e.key];
    if (step) { e.preventDefault(); spin(step[0], step[1]); }
  });
  document.querySelectorAll("[data-frame]").forEach((b) => b.addEventListener("click", () => {
    show(Number(b.dataset.frame));
    if (!box.contains(b)) box.scrollIntoView({ block: "nearest" });
  }));
  box.querySelectorAll("[data-model]").forEach((b) => b.addEventListener("click", () => {
    arrows = b.dataset.model !== "none"; if (arrows) model = b.dataset.model;
    press("[data-model]", "model", b.dataset.model); draw();
  }));
  box.querySelectorAll("[data-zoom]").forEach((b) => b.addEventListener("click", () => {
    if (b.dataset.zoom === "1") { zoom = 1; turn = home(); } else zoom *= Number(b.dataset.zoom);
    draw();
  }));
  new ResizeObserver(draw).observe(canvas);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  box.hidden = false;
  document.querySelectorAll(".stills").forEach((e) => { e.hidden = true; });
  show(0);
  press("[data-model]", "model", model);
})();
