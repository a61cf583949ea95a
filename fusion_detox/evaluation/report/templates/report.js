(function () {
  "use strict";
  var pairs = Array.from(document.querySelectorAll(".pair"));
  var all = document.getElementById("show-all");

  function set(pair, open) {
    var button = pair.querySelector("button");
    pair.classList.toggle("open", open);
    pair.querySelector(".veil dl").inert = !open;
    button.setAttribute("aria-expanded", String(open));
    button.firstChild.data = open ? "Hide" : "Show";
  }

  function isOpen(pair) {
    return pair.classList.contains("open");
  }

  function note() {
    if (all) all.setAttribute("aria-checked", String(pairs.every(isOpen)));
  }

  pairs.forEach(function (pair) {
    pair.querySelector("button").addEventListener("click", function () {
      set(pair, !isOpen(pair));
      note();
    });
    pair.querySelector(".veil").addEventListener("click", function () {
      if (!isOpen(pair)) set(pair, true);
      note();
    });
  });

  if (all) {
    all.addEventListener("click", function () {
      var open = !pairs.every(isOpen);
      pairs.forEach(function (pair) {
        set(pair, open);
      });
      note();
    });
  }
})();
