(function () {
  "use strict";
  var veiled = Array.from(document.querySelectorAll(".veiled"));
  var all = document.getElementById("show-all");

  function isOpen(one) {
    return one.firstElementChild.hidden;
  }

  function set(one, open) {
    one.firstElementChild.hidden = open;
    one.lastElementChild.hidden = !open;
  }

  function note() {
    all.setAttribute("aria-checked", String(veiled.length > 0 && veiled.every(isOpen)));
  }

  veiled.forEach(function (one) {
    one.firstElementChild.addEventListener("click", function () {
      set(one, true);
      // The button is gone, so keep the place of the keyboard.
      var word = one.lastElementChild;
      var target = word.querySelector("a") || word;
      if (target === word) word.tabIndex = -1;
      target.focus();
      note();
    });
  });

  if (!veiled.length) all.parentElement.hidden = true;
  all.addEventListener("click", function () {
    var open = !veiled.every(isOpen);
    veiled.forEach(function (one) {
      set(one, open);
    });
    note();
  });

  function show() {
    var step = /^#step-\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (!step) return;
    step.querySelector("details").open = true;
    step.focus();
  }

  window.addEventListener("hashchange", show);
  show();
})();
