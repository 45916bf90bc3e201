"use strict";
setUpTheme();
summaryTable();
plots();
bdTable();
const viewer = new Viewer();
imageTable((image, model) => {
  if (!viewer.pictures.some(entry => entry.image === image)) return;
  viewer.look({ image, left: data.original, right: model });
  byId("pictures").scrollIntoView({ behavior: "smooth" });
  byId("stage").focus({ preventScroll: true });
});
